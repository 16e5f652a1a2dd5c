"""`npuq convert`: a checkpoint directory becomes an artifact directory."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING

import click

from ..choices import METHODS, RECIPES
from ..errors import ConversionError, NpuqError, RecipeError
from ..units import format_duration
from .options.reading import as_option, beginning
from .terminal.console import emit_json, format_bytes, json_option, show, size, work_is_done
from .terminal.progress import TerminalProgress, progress_options
from .transfer import open_pusher, open_source

if TYPE_CHECKING:
    from ..convert import Summary
    from ..hub import PushSummary


class ConversionInterruptedError(NpuqError):
    """A signal ended the conversion; its finished work is kept."""

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}; run the same command to continue")
        self.exit_code = 128 + number


def _known_method(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Check the method; a misspelt one is wrong usage."""
    from ..recipes.reading import parse_chain

    if value is not None:
        try:
            parse_chain(value, "--method")
        except RecipeError as error:
            raise click.BadParameter(str(error).removeprefix("--method: ")) from error
    return value


@click.command()
@click.argument("source", type=click.Path(exists=False))
@click.argument("output", type=click.Path(exists=False))
@click.option(
    "--recipe",
    shell_complete=beginning(RECIPES),
    help="w4a8, w8a8, float, or a YAML file. [default: w4a8; a quantized SOURCE keeps what it has]",
)
@click.option(
    "--method",
    callback=_known_method,
    shell_complete=beginning(METHODS),
    help="minmax, mse or gptq, after rotate, smooth or both (rotate+smooth+gptq, say); or auto. [default: mse]",
)
@click.option(
    "--calibration", help="Text for gptq and smooth: a file (.txt, .jsonl), a directory, or builtin. [default: builtin]"
)
@click.option("--samples", type=click.IntRange(min=1), help="Samples of the calibration text. [default: 128]")
@click.option("--sequence-length", type=click.IntRange(min=2), help="Tokens of a sample. [default: 512]")
@click.option(
    "--time-budget",
    type=click.FloatRange(min=0),
    metavar="MINUTES",
    help="Leave out auto's trials where calibrating all layers would take longer with them.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda", "npu"]),
    default="cpu",
    help="Where gptq and smooth compute matrices: cpu, or torch on an accelerator. [default: cpu]",
)
@click.option("--workers", type=click.IntRange(min=1), help="Threads. [default: cores]")
@click.option("--max-memory", type=size, help="Bound of the working set beside torch and the plan, such as 500MB.")
@click.option("--max-shard-size", type=size, default="5GB", show_default=True, help="Largest output file.")
@click.option("--base-model", metavar="OWNER/NAME", help="Name of SOURCE on the hub, for the model card.")
@as_option("SOURCE")
@click.option("--revision", metavar="REVISION", help="Branch, tag or commit, of a SOURCE on the hub. [default: main]")
@click.option("--download-window", type=size, help="Disk for weights of a SOURCE on the hub. [default: 20GB]")
@click.option(
    "--push", "repo", metavar="USER/NAME", help="Push finished shards while later ones are made, then the rest."
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print jobs, sizes, memory and disk needed; write nothing. Exit status 1 where a run would not start.",
)
@click.option("--force", is_flag=True, help="Start although the disk has too little room.")
@progress_options
@json_option("Print the summary as JSON.")
def command(
    source: str,
    output: str,
    recipe: str | None,
    method: str | None,
    calibration: str | None,
    samples: int | None,
    sequence_length: int | None,
    time_budget: float | None,
    device: str,
    workers: int | None,
    max_memory: int | None,
    max_shard_size: int,
    base_model: str | None,
    family: str | None,
    revision: str | None,
    download_window: int | None,
    repo: str | None,
    dry_run: bool,
    force: bool,
    progress: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Convert the checkpoint SOURCE into the artifact directory OUTPUT.

    SOURCE is a directory, or user/name on the hub: its weights are then fetched, converted and removed piece by piece,
    with at most --download-window of them on disk.

    SOURCE may be quantized already, by ModelSlim or by llm-compressor (compressed-tensors, one scale a channel): its
    codes and scales are kept, and get the names, tables and manifest of an artifact.

    Interrupted at any moment, the same command continues: existing output is read again, and made again where it is not
    as it was written, or where SOURCE is not as it was read. The artifact does not depend on workers, memory or
    interruptions, to the byte; only --time-budget makes it depend on how fast the machine is.
    """
    from ..convert import CalibrationText, convert_checkpoint
    from ..convert.calibrate.devices import Device
    from ..convert.calibrate.settings import DEFAULT_SAMPLES, DEFAULT_SEQUENCE_LENGTH

    if repo is not None and dry_run:
        raise click.UsageError("--push has nothing to push in a --dry-run")
    display = TerminalProgress(progress, quiet)
    with signals_raise(), display:
        pusher = None if repo is None else open_pusher(output, repo, display.note)
        summary = convert_checkpoint(
            open_source(source, output, revision, download_window),
            output,
            recipe=recipe,
            method=method,
            calibration=CalibrationText(
                calibration,
                samples or DEFAULT_SAMPLES,
                sequence_length or DEFAULT_SEQUENCE_LENGTH,
                None if time_budget is None else 60 * time_budget,
                Device(device),
            ),
            workers=workers,
            max_memory=max_memory,
            max_shard_size=max_shard_size,
            base_model=base_model,
            family=family,
            dry_run=dry_run,
            force=force,
            progress=display,
            on_shard=None if pusher is None else pusher.add,
        )
        pushed = None if pusher is None else pusher.finish()
    with nullcontext() if dry_run else work_is_done():
        _print(summary, pushed, as_json)
    if summary.refusal is not None:
        raise ConversionError(summary.refusal)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the conversion cleanly; a second signal meanwhile has its usual effect."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def interrupt(number: int, frame: FrameType | None) -> None:
        restore()
        raise ConversionInterruptedError(number)

    for number in previous:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        restore()


def _print(summary: Summary, pushed: PushSummary | None, as_json: bool) -> None:
    if as_json:
        emit_json(summary.as_dict() | ({} if pushed is None else {"push": pushed.as_dict()}))
        return
    _print_summary(summary)
    if pushed is not None:
        show(f"pushed: {pushed.url}, commit {pushed.commit[:12]}")


def _print_summary(summary: Summary) -> None:
    before, after = format_bytes(summary.source_bytes), format_bytes(summary.output_bytes)
    if summary.status == "finished":
        show(f"{summary.output} is finished already, with these arguments: nothing to do")
        return
    show(*_table(summary))
    if summary.status == "converted":
        resumed = f" ({summary.jobs_resumed} of them before)" if summary.jobs_resumed else ""
        show(
            f"{summary.jobs} weights{resumed}, {before} → {after} in {summary.seconds:.1f} s, "
            f"peak memory {format_bytes(summary.peak_rss_bytes)}: {summary.output}"
        )
        return
    for note in summary.notes:
        show(note)
    show(f"output directory: {summary.output_state}")
    show(f"{summary.jobs} jobs, {summary.tensors} tensors in {summary.shards} shards, {before} → {after}")
    rows, planned = format_bytes(summary.memory_bytes), format_bytes(summary.plan_bytes)
    show(f"memory: about {rows} for {summary.workers} workers and {planned} for the plan, beside torch itself")
    if summary.expected_seconds is not None:
        show(f"time: about {format_duration(summary.expected_seconds)} as fast as this machine is now")
    missing = ""
    if summary.missing_disk_bytes < summary.needed_disk_bytes:
        missing = f", {format_bytes(summary.missing_disk_bytes)} of it still"
    needed, free = format_bytes(summary.needed_disk_bytes), format_bytes(summary.free_disk_bytes)
    show(f"disk: {needed} needed{missing}, {free} free")


def _table(summary: Summary) -> list[str]:
    lines = [f"{'role':<18} {'scheme':<14} {'tensors':>8} {'before':>9} {'after':>9} {'weight error':>12}"]
    for role in summary.roles:
        error = f"{role['relative_error']:.2%}" if role["relative_error"] is not None else ""
        lines.append(
            f"{role['role']:<18} {role['scheme']:<14} {role['tensors']:>8} {format_bytes(role['source_bytes']):>9} "
            f"{format_bytes(role['output_bytes']):>9} {error:>12}"
        )
    return [line.rstrip() for line in lines]
