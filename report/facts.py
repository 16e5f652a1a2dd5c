"""The numbers of a report, read from a finished artifact: headers, scales and the manifest, but no weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import ArtifactError
from ..formats.artifact import (
    DESCRIPTION_NAME,
    MANIFEST_NAME,
    RECIPE_NAME,
    is_own,
    read_description,
    read_manifest,
    read_report,
)
from ..formats.checkpoint import Checkpoint
from ..formats.sources.model_config import read_model_config
from ..inputs.files import inside, read_text
from ..inputs.forms import is_number
from ..models.tensors import Spec, expected_specs
from ..progress import Progress
from ..verification.evaluations import read_evaluations
from ..verification.task_results import read_tasks
from .calibration import Coverage, read_coverage
from .foreign import foreign_linears, foreign_roles, mtp_layers
from .linears import LinearFacts, RoleFacts, linear_facts
from .scale_histogram import ScaleHistogram, scale_histograms, scale_name

_MOST_RECIPE_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Facts:
    """All numbers and texts of a report. Facts from npuq's manifest are None or empty for an artifact of ModelSlim's;
    `coverage` is also None without calibration.

    provenance: the sources and tools of the artifact, in the order of the page. recipe: its name; recipe_yaml: its
    text.
    """

    name: str
    model_type: str
    layers: int
    experts: int
    recipe: str | None
    recipe_yaml: str | None
    provenance: Mapping[str, str]
    roles: tuple[RoleFacts, ...]
    linears: tuple[LinearFacts, ...]
    scales: tuple[ScaleHistogram, ...]
    coverage: Coverage | None
    evaluations: tuple[Mapping[str, Any], ...]
    tasks: tuple[Mapping[str, Any], ...] = ()

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(role.output_bytes for role in self.roles)

    @property
    def source_bytes(self) -> int | None:
        """Bytes of the same tensors in the source; None where they are not known."""
        known = [role.source_bytes for role in self.roles if role.source_bytes is not None]
        return sum(known) if len(known) == len(self.roles) else None

    @property
    def has_mtp(self) -> bool:
        """True with quantized linears in multi-token-prediction layers; report/page.html reads it."""
        return any(linear.layer >= self.layers for linear in self.linears)

    def as_dict(self) -> dict[str, Any]:
        """Fields as values for JSON."""
        return {**asdict(self), "source_bytes": self.source_bytes, "output_bytes": self.output_bytes}


def read_facts(
    directory: str | Path, progress: Progress | None = None, name: str | None = None, family: str | None = None
) -> Facts:
    """Read the facts about an artifact of npuq's or ModelSlim's; `progress` counts linears, by their scales. `name` is
    its name on the page, the directory's name where it is None. One of unknown model_type is read as one of `family`.

    Raises ArtifactError when the directory holds no finished artifact, or its manifest, role totals or scales are
    damaged, and CheckpointError when its config or shards are.
    """
    directory = Path(directory)
    name = directory.resolve().name if name is None else name
    with Checkpoint.open(directory) as checkpoint:
        checkpoint.read_as(family)
        if is_own(directory):
            return _own(name, checkpoint, progress)
        return _foreign(name, checkpoint, progress)


def _own(name: str, checkpoint: Checkpoint, progress: Progress | None) -> Facts:
    directory = checkpoint.directory
    manifest, config = read_manifest(directory), read_model_config(checkpoint)
    try:
        specs = expected_specs(config, tuple(manifest["architecture"]["mtp_layers"]))
        linears = tuple(_linear(specs[linear], entry) for linear, entry in manifest["linears"].items())
        recipe, provenance = str(manifest["recipe"]["name"]), _provenance(manifest)
    except (KeyError, ValueError) as error:
        where = directory / MANIFEST_NAME
        raise ArtifactError(f"{where}: damaged ({error!r}); run npuq verify, or convert again") from error
    return Facts(
        name=name,
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        experts=config.n_routed_experts,
        recipe=recipe,
        recipe_yaml=read_text(inside(directory, RECIPE_NAME, ArtifactError), ArtifactError, _MOST_RECIPE_BYTES),
        provenance=provenance,
        roles=tuple(_role(entry) for entry in read_report(directory)["roles"]),
        linears=linears,
        scales=scale_histograms(checkpoint, linears, progress),
        coverage=read_coverage(manifest),
        evaluations=tuple(read_evaluations(manifest)),
        tasks=tuple(read_tasks(manifest)),
    )


def _foreign(name: str, checkpoint: Checkpoint, progress: Progress | None) -> Facts:
    directory = checkpoint.directory
    types = read_description(directory)
    if types is None:
        raise ArtifactError(
            f"{directory}: has no {DESCRIPTION_NAME}: no artifact of npuq's or ModelSlim's; npuq convert makes one"
        )
    config = read_model_config(checkpoint)
    specs = expected_specs(config, mtp_layers(checkpoint, config))
    linears = foreign_linears(checkpoint, types, specs)
    # ModelSlim's static W8A8 may have no weight scale: it is folded into another scale.
    scaled = [linear for linear in linears if scale_name(linear) in checkpoint.tensors]
    return Facts(
        name=name,
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        experts=config.n_routed_experts,
        recipe=None,
        recipe_yaml=None,
        provenance={},
        roles=foreign_roles(checkpoint, types, specs),
        linears=linears,
        scales=scale_histograms(checkpoint, scaled, progress),
        coverage=None,
        evaluations=(),
    )


def _linear(spec: Spec, entry: Mapping[str, Any]) -> LinearFacts:
    return linear_facts(spec, entry["scheme"], entry["relative_error"], entry.get("output_error"))


def _provenance(manifest: Mapping[str, Any]) -> dict[str, str]:
    source, totals = manifest["source"], manifest["totals"]
    known = {
        "source": source["name"],
        "source repository": source["repo"],
        "source commit": source["revision"],
        "sha256 of its config.json": source["config_sha256"],
        "sha256 of its index": source["index_sha256"],
        "weights of the source": _forms(source),
        "notes on the source": _notes(source),
        "weight error from FP4 to int4": _fp4_error(source),
        "recipe": manifest["recipe"]["name"],
        "sha256 of the recipe": manifest["recipe"]["sha256"],
        "method": manifest["conversion"].get("method"),
        "transforms": ", ".join(map(str, manifest.get("transforms", []))) or None,
        "made by": f"npuq {manifest['npuq_version']}",
        "artifact format": manifest["format_version"],
        "tensors": f"{totals['tensors']:,}",
        "files with size and sha256": f"{len(manifest['files']):,}",
    }
    return {name: str(value) for name, value in known.items() if value is not None}


def _fp4_error(source: Mapping[str, Any]) -> str | None:
    """What int4 adds to FP4 weights, beside what min-max scales would; None where it was not measured."""
    found = source.get("fp4_error")
    if not isinstance(found, Mapping) or not all(is_number(found.get(key)) for key in ("rows", "mse", "minmax")):
        return None
    return f"{found['mse']:.2%} by mse, {found['minmax']:.2%} by minmax scales, on {found['rows']:,} rows"


def _forms(source: Mapping[str, Any]) -> str | None:
    """The number of weights in each form of storage; None in a manifest without it."""
    forms = source.get("forms")
    return ", ".join(f"{count} {form}" for form, count in forms.items()) if isinstance(forms, Mapping) else None


def _notes(source: Mapping[str, Any]) -> str | None:
    """The notes of the conversion, such as what config.json claims and the tensors deny; None without any."""
    notes = source.get("notes")
    return "; ".join(map(str, notes)) or None if isinstance(notes, list) else None


def _role(entry: Mapping[str, Any]) -> RoleFacts:
    return RoleFacts(**{name: entry[name] for name in RoleFacts.__dataclass_fields__})
