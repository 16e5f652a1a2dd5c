"""The keys of an artifact's config.json that loaders read differently from one another, written so that all agree.

transformers, vLLM and SGLang have defaults of their own for missing keys, and choose differently between contradicting
statements. An artifact states npuq's reading explicitly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..models.config import ModelConfig


def loader_keys(raw: Mapping[str, Any], config: ModelConfig, mtp_layers: Sequence[int]) -> dict[str, Any]:
    """The keys of an artifact's config.json to add to the source's (`raw`), or to replace there.

    `mtp_layers` are those of the artifact. Empty where every loader already reads the source's keys rightly, as those
    of the released models.
    """
    keys: dict[str, Any] = {}
    if not raw.get("architectures"):
        keys["architectures"] = [config.family.architecture]
    for key in () if config.moe is None else config.moe.STATED:
        value = getattr(config.moe, key)
        # Also a value of another type: transformers refuses a whole number where it expects a fraction.
        if type(raw.get(key)) is not type(value) or raw[key] != value:
            keys[key] = value
    # transformers refuses null where the key has a type.
    meaning = {"n_shared_experts": 0, **config.family.fixed}
    keys |= {key: value for key, value in meaning.items() if key in raw and raw[key] is None}
    # The artifact always stores the head; with tied embeddings SGLang would not read it, and compute with the
    # embedding.
    if raw.get("tie_word_embeddings", False) is not False:
        keys["tie_word_embeddings"] = False
    count = len(mtp_layers)
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        # vLLM refuses the tensors of a layer that is not counted, and both engines stumble over null.
        wanted = key in raw or (count > 0 and key == "num_nextn_predict_layers")
        if wanted and raw.get(key) != count:
            keys[key] = count
    if raw.get("torch_dtype") is not None and raw.get("dtype") not in (None, raw["torch_dtype"]):
        keys["torch_dtype"] = raw["dtype"]
    return keys
