"""The artifact's format: file names, the description that engines read, the edits to config.json. The writer, the
verifier and the loader share this one definition."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..errors import ArtifactError
from ..inputs.files import inside, is_inside
from ..inputs.forms import Each, Items, Keys, check_form, is_count, is_number, is_text, optional
from ..inputs.json_text import read_object
from ..inputs.names import FileName, Sha256
from ..models.config import TEXT_CONFIG, with_text_keys
from ..models.families import FAMILIES, is_known
from ..models.family import Block
from ..models.recognition import type_as_text
from .schemes import Scheme

FORMAT_VERSION = 1

DESCRIPTION_NAME = "quant_model_description.json"
# Our own files live in a folder, because both engines load every *.safetensors that they find in the root.
OWN_FOLDER = "npuq"
MANIFEST_NAME = f"{OWN_FOLDER}/manifest.json"
ROPE_NAME = f"{OWN_FOLDER}/rope.safetensors"
KV_CACHE_NAME = f"{OWN_FOLDER}/kv_cache.safetensors"
RECIPE_NAME = f"{OWN_FOLDER}/recipe.yaml"
REPORT_NAME = f"{OWN_FOLDER}/report.json"

# The model card is for people, who edit it on a hub: the manifest has no hash of it. A push replaces the section
# between these two lines, and keeps the rest of the card.
CARD_NAME = "README.md"
CARD_BEGIN = "<!-- npuq: this section is generated; edits from here to its end are lost -->"
CARD_END = "<!-- npuq: end of the generated section -->"
# The placeholder of the artifact's path in the card's commands.
CARD_PATH = "PATH_TO_ARTIFACT"

# vLLM-Ascend refuses group_size > 0, knows packed int4 experts and their limit of 16 ranks by version 1.0.0, and tells
# ModelSlim's format from compressed-tensors' by ascend_quant_method.
DESCRIPTION_GLOBALS: Mapping[str, Any] = {
    "version": "1.0.0",
    "model_quant_type": Scheme.W8A8.value,
    "group_size": 0,
    "metadata": {},
    "optional": {},
    "ascend_quant_method": "ascend",
}

_LINEAR = {
    "scheme": is_text,
    "method": is_text,
    "relative_error": is_number,
    "output_error": optional(is_number),
    "source_bytes": is_count,
    "bytes": is_count,
}


def _is_few_layers(value: Any) -> bool:
    """True for a list of at most 1,000 layers: verification expects thousands of tensors for each."""
    return isinstance(value, list) and len(value) <= 1000 and all(map(is_count, value))


_MANIFEST = Keys(
    {
        "source": Keys({"name": is_text, **dict.fromkeys(("repo", "revision", "index_sha256"), optional(is_text))}),
        "architecture": Keys({"model_type": is_text, "mtp_layers": _is_few_layers}),
        "recipe": Each(is_text),
        "conversion": Each(is_text),
        "totals": Each(is_count),
        "files": Each(Keys({"size": is_count, "sha256": Sha256.fits}, frozenset({"size", "sha256"})), FileName.fits),
        "linears": Each(Keys(_LINEAR)),
        "transforms": Items(is_text),
    }
)
_ROLE = {
    "role": is_text,
    "scheme": is_text,
    **dict.fromkeys(("tensors", "parameters", "source_bytes", "output_bytes"), is_count),
    "relative_error": optional(is_number),
}
_REPORT = Keys({"roles": Items(Keys(_ROLE, frozenset(_ROLE)))}, frozenset({"roles"}))

MARKS = ("quantize", "moe_quantize", "mtp_quantize")
"""Keys of config.json: the schemes of linears, of routed experts, and of routed experts in MTP layers."""

_CONFIG_QUANTIZE: Mapping[Scheme | None, str] = {Scheme.W4A8: "w4a8_dynamic", Scheme.W8A8: "w8a8_dynamic"}


def shard_name(number: int, count: int) -> str:
    """The Hugging Face name of shard `number` (from 1) of `count`."""
    return (
        f"model-{number:05d}-of-{count:06d}.safetensors"
        if count > 99999
        else (f"model-{number:05d}-of-{count:05d}.safetensors")
    )


# Tensors of a family that are no module's, as DeepSeek-V4's hc_head_fn.
_WITHOUT_MODULE: Final = frozenset(
    entry.name
    for family in FAMILIES.values()
    for entry in family.entries(Block.TOP)
    if "." not in entry.name and not family.prefix
)


def is_described(name: str) -> bool:
    """False for the bias of a norm: no description of npuq's lists it.

    A key with `norm.bias` in it makes SGLang replace every RMS norm by a slower one with a bias, and vLLM-Ascend add a
    bias of zeros to each. Engines look schemes up by `….weight` alone.
    """
    return "norm.bias" not in name


def description(types: Mapping[str, Scheme]) -> dict[str, Any]:
    """quant_model_description.json for the tensors of the shards, scales included."""
    return {**DESCRIPTION_GLOBALS, **{name: scheme.value for name, scheme in types.items() if is_described(name)}}


def description_path(directory: Path) -> Path | None:
    """The description's path: the name that engines look for, or the only one with a suffix, as older ModelSlim wrote
    it (`quant_model_description_w8a8_dynamic.json`); None for a directory without. ArtifactError for several.
    """
    path = directory / DESCRIPTION_NAME
    if is_inside(directory, DESCRIPTION_NAME):
        return path
    others = sorted(directory.glob(f"{Path(DESCRIPTION_NAME).stem}*.json"))
    if len(others) > 1:
        names = " and ".join(path.name for path in others[:2])
        raise ArtifactError(f"{directory}: {names}: which description is meant? Keep one, named {DESCRIPTION_NAME}")
    return others[0] if others else None


def is_own(directory: Path) -> bool:
    """True for an artifact that npuq made or has begun: ModelSlim writes neither manifest nor rotary tables."""
    return is_inside(directory, OWN_FOLDER)


def is_rotated(directory: Path) -> bool:
    """True where the artifact's residual stream is the source's, rotated by `rotation(hidden_size)`."""
    return is_inside(directory, MANIFEST_NAME) and "rotate" in read_manifest(directory).get("transforms", ())


def read_description(directory: Path) -> dict[str, Scheme] | None:
    """Read an artifact's schemes by tensor name; None for a directory without a description (a float checkpoint).

    Raises ArtifactError for a malformed description, an unknown scheme, or groups along K.
    """
    path = description_path(directory)
    if path is None:
        return None
    entries = read_object(inside(directory, path.name, ArtifactError), ArtifactError)
    types = {name: value for name, value in entries.items() if name not in DESCRIPTION_GLOBALS}
    if entries.get("group_size", 0):
        raise ArtifactError(
            f"{path}: group_size {entries['group_size']!r}: npuq and the engines read one scale a channel; "
            "quantize the float checkpoint per channel"
        )
    packed = Scheme.W4A8.value in types.values()
    if packed and not is_own(directory) and entries.get("version") != DESCRIPTION_GLOBALS["version"]:
        raise ArtifactError(
            f"{path}: version {entries.get('version')!r}: its 4-bit weights lie in ModelSlim's older, unpacked layout; "
            "npuq reads 1.0.0: quantize the float checkpoint again"
        )
    result = {}
    for name, value in types.items():
        # ModelSlim adds global keys from release to release; only those that name a tensor matter here.
        if not _names_tensor(name):
            continue
        try:
            result[name] = Scheme(value)
        except ValueError:
            known = ", ".join(scheme.value for scheme in Scheme)
            raise ArtifactError(f"{path}: {name!r} has unknown type {value!r}; npuq knows {known}") from None
    return result


def read_description_keys(directory: Path) -> dict[str, Any]:
    """The keys of an artifact's description that name no tensor; none without a description.

    Raises ArtifactError for a malformed description.
    """
    path = description_path(directory)
    entries = {} if path is None else read_object(inside(directory, path.name, ArtifactError), ArtifactError)
    return {name: value for name, value in entries.items() if not _names_tensor(name)}


def _names_tensor(name: str) -> bool:
    """True for a key of a description that names a tensor: one with a module, or one of a family without."""
    return "." in name or name in _WITHOUT_MODULE


def artifact_config(
    config: Mapping[str, Any], *, linear: Scheme, experts: Scheme, mtp_experts: Scheme | None
) -> dict[str, Any]:
    """The artifact's config.json, from the source's.

    `quantization_config` is removed, under text_config too, because both engines would follow it and ignore the
    description; so is DeepSeek-V4's `expert_dtype`, by which int8 codes would be read as FP4. `quantize`,
    `moe_quantize` and, with MTP layers, `mtp_quantize` are added where the part is quantized, among the text model's
    keys: vLLM-Ascend's fused paths read them there.
    """
    result = copy.deepcopy(dict(config))
    schemes = (linear, experts, mtp_experts)
    marks = {key: value for key, scheme in zip(MARKS, schemes, strict=True) if (value := _CONFIG_QUANTIZE.get(scheme))}
    for part in (result, result.get(TEXT_CONFIG)):
        if isinstance(part, dict):
            for key in ("quantization_config", "expert_dtype", *MARKS):
                part.pop(key, None)
    return with_text_keys(result, marks)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read npuq/manifest.json, which only a finished artifact has. Any key may be missing; every key that is there has
    the type that npuq writes, and every file name stays inside the artifact.

    Raises ArtifactError when the file is missing, is no manifest, or has an unknown format version.
    """
    path = directory / MANIFEST_NAME
    if not is_inside(directory, MANIFEST_NAME):
        raise ArtifactError(
            f"{path}: missing; this is no finished npuq artifact: run `npuq convert` (again) to make or finish it"
        )
    manifest = read_object(inside(directory, MANIFEST_NAME, ArtifactError), ArtifactError)
    if "format_version" not in manifest:
        raise ArtifactError(f"{path}: not an artifact manifest; convert again")
    if manifest["format_version"] != FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: artifact format {manifest['format_version']!r}; this npuq knows {FORMAT_VERSION}: "
            "use the npuq that made it, or convert again"
        )
    check_form(manifest, _MANIFEST, str(path), ArtifactError)
    return manifest


def converted_as(directory: Path, source_config: Mapping[str, Any]) -> str | None:
    """The family as which an artifact's source was read, where this is its config.json and the model_type unknown; None
    for any other."""
    if is_known(source_config.get("model_type")) or not is_inside(directory, MANIFEST_NAME):
        return None
    manifest = read_manifest(directory)
    source, architecture = manifest.get("source", {}), manifest.get("architecture", {})
    if source.get("model_type") != type_as_text(source_config):
        return None
    family: str | None = architecture.get("model_type")
    return family


def read_report(directory: Path) -> dict[str, Any]:
    """npuq/report.json: `roles`, each with bytes, counts and errors, of the types that npuq writes, and more.

    Raises ArtifactError when it is missing or is not such a report.
    """
    path = inside(directory, REPORT_NAME, ArtifactError)
    report = read_object(path, ArtifactError)
    check_form(report, _REPORT, str(path), ArtifactError)
    return report
