"""generation_config.json: the end-of-sequence tokens, and the authors' sampling parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ...errors import GenerationError
from ...inputs.files import inside, is_inside
from ...inputs.json_text import read_object
from ...inputs.printable import shown
from ..sampling.params import SamplingParams

NAME: Final = "generation_config.json"
_MOST_BYTES: Final = 1 << 20


def read_generation_config(directory: Path) -> Mapping[str, Any]:
    """Read the file's object; empty without such a file. Raises GenerationError for a file that holds no object."""
    if not is_inside(directory, NAME):
        return {}
    return read_object(inside(directory, NAME, GenerationError), GenerationError, _MOST_BYTES)


def eos_ids(directory: Path, generation: Mapping[str, Any], config: Mapping[str, Any]) -> frozenset[int]:
    """End-of-sequence ids of generation_config.json, else of config.json: one, several or none."""
    value, name = generation.get("eos_token_id"), NAME
    if value is None:
        value, name = config.get("eos_token_id"), "config.json"
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in ids):
        raise GenerationError(f"{directory / name}: eos_token_id {shown(value)} must be a token id or a list of them")
    return frozenset(ids)


def default_sampling(directory: Path, generation: Mapping[str, Any], temperature: float = 0.0) -> SamplingParams:
    """Sampling parameters of the file, for requests without their own.

    Greedy for do_sample false; a temperature without do_sample samples, as in vLLM. A file with neither has the
    temperature given here. Parameters that the file leaves out are off: transformers' top_k of 50 is not the authors'.
    Raises GenerationError for values of a wrong type or out of range.
    """
    where = directory / NAME
    sampled = generation.get("do_sample")
    if sampled is not None and not isinstance(sampled, bool):
        raise GenerationError(f"{where}: do_sample must be true or false, not {shown(sampled)}")
    samples = sampled if sampled is not None else temperature > 0 or generation.get("temperature") is not None
    names = ["repetition_penalty", *(["temperature", "top_k", "top_p", "min_p"] if samples else [])]
    values = {name: generation[name] for name in names if generation.get(name) is not None}
    if samples:
        values.setdefault("temperature", 1.0 if sampled else temperature)
    if values.get("top_k") == -1:  # another way to turn it off
        del values["top_k"]
    try:
        return SamplingParams(**values)
    except GenerationError as error:
        raise GenerationError(f"{where}: {error}; correct the file, or remove the field") from error
