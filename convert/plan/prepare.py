"""Preparation: open the source, classify its tensors, resolve the recipe, plan, and sign the result."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ... import __version__
from ...engines.placement import engine_notes
from ...errors import CheckpointError, RecipeError
from ...formats.artifact import FORMAT_VERSION
from ...formats.checkpoint import CONFIG_NAME, Checkpoint, index_path
from ...formats.schemes import Scheme
from ...formats.sources.draft_heads import missing_heads, with_heads
from ...formats.sources.integer_tables import with_checked_tables
from ...formats.sources.model_config import read_model_config
from ...formats.sources.opening import open_weights
from ...formats.sources.rewritten import rewritten
from ...formats.sources.rotated import rotated
from ...formats.sources.ties import share_tied
from ...formats.sources.weights import WeightSource
from ...inputs.files import file_sha256, inside
from ...inputs.printable import name_as_text
from ...models.config import ModelConfig
from ...models.inventory import Inventory, take_inventory
from ...models.rope import table_bytes
from ...parallel.collector import collector_paused
from ...quant.scales import Method
from ...recipes.reading import load_recipe
from ...recipes.recipe import STORED, Recipe, Target
from ..calibrate.devices import Device
from ..calibrate.settings import BUILTIN, DEFAULT_SAMPLES, DEFAULT_SEQUENCE_LENGTH, CalibrationText
from ..finish.side_files import side_files
from .assignments import Assignment, check_recipe, check_source, resolve
from .plan import Plan, build_plan
from .statements import statements

if TYPE_CHECKING:
    from ..calibrate.texts import Calibration


@dataclass(frozen=True)
class Origin:
    """The origin of a checkpoint: the hub repository whose cache holds it, or only its directory's name."""

    name: str
    repo: str | None
    revision: str | None
    config_sha256: str
    index_sha256: str | None


@dataclass(frozen=True)
class Prepared:
    """A conversion ready to run, with its open checkpoint."""

    checkpoint: Checkpoint
    source: WeightSource
    config: ModelConfig
    origin: Origin
    recipe: Recipe
    inventory: Inventory
    plan: Plan
    side_files: tuple[str, ...]
    rope_bytes: int
    max_shard_size: int
    calibration: Calibration | None = None
    time_budget: float | None = None
    device: Device = Device.CPU  # of calibration's matrix work
    statements: tuple[str, ...] = ()  # contradictions in the checkpoint, and how each is decided
    base_model: str | None = None  # the source's name on the hub, for the card

    @cached_property
    def identity(self) -> dict[str, str]:
        """Every input that decides bytes of the manifest, as text that an error message can show.

        An interrupted run and its continuation must share it. `base_model` is not part of it: it goes into the card
        alone, which belongs to people.
        """
        digest = hashlib.sha256(self.origin.config_sha256.encode())
        for info in self.checkpoint.tensors.values():
            entry = (info.name, info.dtype, info.shape, info.file.name, info.start, info.end)
            digest.update(repr(entry).encode())
        recipe_digest = hashlib.sha256(self.recipe.to_yaml().encode()).hexdigest()
        revision = f"@{self.origin.revision}" if self.origin.revision else ""
        calibrated = {}
        if self.calibration is not None:
            # The hash is of all samples' tokens in a row: it does not say where each ends.
            size = f"{self.calibration.samples} samples of {self.calibration.sequence_length}"
            calibrated["calibration"] = f"{self.calibration.name} {self.calibration.sha256[:16]}, {size} tokens"
            if self.device is not Device.CPU:
                calibrated["device"] = self.device.value
        return {
            "source": self.origin.name + revision,
            "source config or tensors": digest.hexdigest()[:16],
            "recipe": f"{self.recipe.name} {recipe_digest[:16]}",
            "method": STORED if self.recipe.stored else self.recipe.chain,
            **calibrated,
            **({} if self.checkpoint.stated is None else {"family": self.config.model_type}),
            "maximum shard size": str(self.max_shard_size),
            "npuq version": __version__,
            "artifact format": str(FORMAT_VERSION),
        }


@collector_paused()
def prepare(
    opened: Path | Checkpoint,
    recipe: str | Path | None,
    method: str | None,
    max_shard_size: int,
    text: CalibrationText | None = None,
    family: str | None = None,
) -> Prepared:
    """Plan a conversion without reading a weight. Raises CheckpointError and RecipeError for all bad input.

    An open checkpoint is taken over: closing the result, or an error here, closes it. Without a recipe a float
    checkpoint gets w4a8, and a quantized one keeps its schemes. A checkpoint of unknown model_type is read as one of
    `family`.
    """
    checkpoint: Checkpoint | None = None
    try:
        if isinstance(opened, Checkpoint):
            checkpoint = opened
        resolved = None if recipe is None else load_recipe(recipe, method)
        checkpoint = opened if isinstance(opened, Checkpoint) else Checkpoint.open(opened)
        directory = checkpoint.directory
        checkpoint.read_as(family)
        config = read_model_config(checkpoint)
        rope_bytes = table_bytes(config)  # here, because what its tables cannot be made of must be refused first
        shared = share_tied(checkpoint)
        source = open_weights(checkpoint)
        stored = source.schemes if source.is_quantized else None
        resolved = resolved or load_recipe("w4a8" if stored is None else STORED, method)
        if text is not None and text.time_budget is not None and not resolved.auto:
            raise RecipeError("--time-budget bounds the trials of --method auto, and no other method has any")
        check_source(resolved, stored is not None)
        if resolved.rotate and config.family.no_rotation:
            raise RecipeError(
                f"method {resolved.chain}: no rotation of a {config.model_type}: {config.family.no_rotation}"
            )
        heads: list[str] = []
        if resolved.rotate:
            heads = missing_heads(source, config)
            source = with_heads(source, config)
        inventory = take_inventory(config, source.weights)
        source = with_checked_tables(source, inventory.specs)
        assignments = resolve(resolved, inventory.specs, config.num_hidden_layers, stored)
        check_recipe(resolved, inventory.specs, assignments)
        assignments = _data_free_outside_walk(config, inventory, assignments, resolved)
        if _needs_calibration(resolved, assignments) and config.family.no_calibration:
            raise RecipeError(
                f"method {resolved.chain}: not for a {config.model_type}: {config.family.no_calibration}; give "
                "--method mse or minmax"
            )
        if checkpoint.window is not None and (resolved.transforms or _needs_calibration(resolved, assignments)):
            if _needs_calibration(resolved, assignments):
                from ..calibrate.texts import read_tokenizer

                read_tokenizer(directory)  # fail here and not after the download
            raise RecipeError(
                f"method {resolved.chain} reads weights more than once, and a checkpoint on a hub passes by: fetch it "
                "first (hf download), and convert the directory"
            )
        calibration = _calibration(resolved, assignments, text or CalibrationText(), directory, config)
        if resolved.rotate:
            source = rewritten(source, rotated(config, inventory))
        float16 = config.dtype_code == "F16"
        plan = build_plan(source.weights, inventory, assignments, max_shard_size, float16=float16)
        names = tuple(side_files(directory))
        origin = _origin(directory)
        said = statements(checkpoint, config, inventory, source, shared, heads)
        if resolved.target is Target.ENGINES:
            schemes = {name: assignment.scheme for name, assignment in assignments.items()}
            said += engine_notes(config, schemes, inventory.unknown, inventory.specs)
    except BaseException:
        if checkpoint is not None:
            checkpoint.close()
        raise
    return Prepared(
        checkpoint=checkpoint,
        source=source,
        config=config,
        origin=origin,
        recipe=resolved,
        inventory=inventory,
        plan=plan,
        side_files=names,
        rope_bytes=rope_bytes,
        max_shard_size=max_shard_size,
        calibration=calibration,
        time_budget=text.time_budget if text else None,
        device=text.device if text else Device.CPU,
        statements=tuple(said),
    )


def _data_free_outside_walk(
    config: ModelConfig, inventory: Inventory, assignments: dict[str, Assignment], recipe: Recipe
) -> dict[str, Assignment]:
    """Replace GPTQ by its data-free part outside the main model's layers, where calibration does not walk."""
    result = {}
    for name, spec in inventory.specs.items():
        assignment = assignments[name]
        if spec.layer is None or spec.layer >= config.num_hidden_layers:
            if assignment.scheme is Scheme.W8A8_STATIC and not recipe.stored:
                raise RecipeError(
                    f"recipe {recipe.name!r}: {name!r} cannot be W8A8_STATIC: calibration does not run MTP layers; "
                    "give the rule 'layers' that leave them out"
                )
            assignment = replace(assignment, method=assignment.method.scale_search)
        result[name] = assignment
    return result


def _needs_calibration(recipe: Recipe, assignments: Mapping[str, Assignment]) -> bool:
    return not recipe.stored and (
        recipe.smooth
        or any(
            assignment.scheme is Scheme.W8A8_STATIC
            or (assignment.method is Method.GPTQ and assignment.scheme is not Scheme.FLOAT)
            for assignment in assignments.values()
        )
    )


def _calibration(
    recipe: Recipe, assignments: Mapping[str, Assignment], text: CalibrationText, directory: Path, config: ModelConfig
) -> Calibration | None:
    """The calibration tokens; None where no weight needs them."""
    if _needs_calibration(recipe, assignments):
        from ..calibrate.texts import read_calibration

        position = int(config.rope.max_position)
        path = text.path or BUILTIN
        return read_calibration(path, directory, config.vocab_size, position, text.samples, text.sequence_length)
    method = STORED if recipe.stored else recipe.chain
    if text.device is not Device.CPU:
        raise RecipeError(f"--device is for methods that calibrate, and {method} does not: leave the option out")
    if (text.path, text.samples, text.sequence_length) != (None, DEFAULT_SAMPLES, DEFAULT_SEQUENCE_LENGTH):
        raise RecipeError(
            f"--calibration, --samples and --sequence-length are of no use to method {method}: give --method gptq, "
            "smooth or a chain of them"
        )
    return None


def _origin(directory: Path) -> Origin:
    path = directory.resolve()
    repo = revision = None
    # A Hugging Face cache: models--OWNER--NAME/snapshots/REVISION
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        repo = name_as_text(path.parent.parent).removeprefix("models--").replace("--", "/", 1)
        revision = name_as_text(path)
    index = index_path(directory)
    return Origin(
        name=repo or name_as_text(path),
        repo=repo,
        revision=revision,
        config_sha256=file_sha256(inside(directory, CONFIG_NAME), CheckpointError),
        index_sha256=None if index is None else file_sha256(inside(directory, index.name), CheckpointError),
    )
