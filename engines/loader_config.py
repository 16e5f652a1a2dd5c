"""The keys of an artifact's config.json that loaders read differently from one another, written so that all agree.

transformers, vLLM and SGLang have defaults of their own for missing keys, and choose differently between contradicting
statements. An artifact states npuq's reading explicitly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..models.config import ModelConfig, text_config, with_text_keys


def loader_config(raw: Mapping[str, Any], config: ModelConfig, mtp_layers: Sequence[int]) -> dict[str, Any]:
    """An artifact's config.json with its source's keys (`raw`), and with keys that are added or replaced there.

    `mtp_layers` are those of the artifact. Equal to `raw` where every loader already reads its keys rightly, as those
    of the released models.
    """
    authors = config.family.deepseek_keys(text_config(raw))
    if text_config(raw).keys() - authors.keys():  # transformers' spelling: engines read the authors' alone
        raw = authors
    top = dict(raw)
    if not raw.get("architectures"):
        top["architectures"] = [config.family.architecture]
    # Of a nested config transformers ties the head by the key at the top, whose default is true.
    if config.family.text_types and raw.get("tie_word_embeddings") is not False:
        top["tie_word_embeddings"] = False
    return with_text_keys(top, _text_keys(text_config(raw), config, mtp_layers))


def _text_keys(raw: Mapping[str, Any], config: ModelConfig, mtp_layers: Sequence[int]) -> dict[str, Any]:
    """The keys of the text model to add to the source's (`raw`), or to replace there."""
    experts = config.moe_keys()
    # Also a value of another type: transformers refuses a whole number where it expects a fraction.
    keys = {key: value for key, value in experts.items() if type(raw.get(key)) is not type(value) or raw[key] != value}
    # Engines take an absent flag for false.
    keys |= {key: value for key, value in config.attention.stated().items() if value and raw.get(key) != value}
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
