"""generation_config.json: which tokens end a sequence, and how its authors sample the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ...errors import GenerationError
from ...inputs.files import inside, is_inside
from ...inputs.json_text import read_object
from ...inputs.printable import shown
from ..sampler import SamplingParams

NAME: Final = "generation_config.json"
_MOST_BYTES: Final = 1 << 20


def read_generation_config(directory: Path) -> Mapping[str, Any]:
    """The file's object, empty where there is no such file. GenerationError for a file that is not one."""
    if not is_inside(directory, NAME):
        return {}
    return read_object(inside(directory, NAME, GenerationError), GenerationError, _MOST_BYTES)


def eos_ids(directory: Path, generation: Mapping[str, Any], config: Mapping[str, Any]) -> frozenset[int]:
    """The end-of-sequence ids of generation_config.json, else of config.json: one, several or none."""
    value, name = generation.get("eos_token_id"), NAME
    if value is None:
        value, name = config.get("eos_token_id"), "config.json"
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in ids):
        raise GenerationError(f"{directory / name}: eos_token_id {shown(value)} must be a token id or a list of them")
    return frozenset(ids)


def default_sampling(directory: Path, generation: Mapping[str, Any]) -> SamplingParams:
    """How the model is sampled where nobody says otherwise.

    As the file says it: greedy where do_sample is false, or left out beside no temperature; a temperature without
    do_sample counts, as in vLLM. What the file leaves out is off: transformers' own top_k of 50 is not the authors'.
    Raises GenerationError for values that are none.
    """
    where = directory / NAME
    sampled = generation.get("do_sample")
    if sampled is not None and not isinstance(sampled, bool):
        raise GenerationError(f"{where}: do_sample must be true or false, not {shown(sampled)}")
    names = ["repetition_penalty"]
    if sampled or (sampled is None and generation.get("temperature") is not None):
        names += ["temperature", "top_k", "top_p", "min_p"]
    values = {name: generation[name] for name in names if generation.get(name) is not None}
    if sampled:
        values.setdefault("temperature", 1.0)
    if values.get("top_k") == -1:  # another way of saying that it is off
        del values["top_k"]
    try:
        return SamplingParams(**values)
    except GenerationError as error:
        raise GenerationError(f"{where}: {error}; correct the file, or remove the field") from error
