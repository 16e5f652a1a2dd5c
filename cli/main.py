"""The `npuq` command: a group whose commands are imported when they run, and the one place where errors become exit
codes."""

from __future__ import annotations

import io
import os
import shlex
import sys
import time
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import click

from .. import __version__
from ..errors import NpuqError, NpuqWarning
from ..inputs.launch import Launch
from .examples import EXAMPLES, epilog
from .ranks import CommandRanks
from .terminal.console import OutputError, Settings, complain, emit_error, flush, one_line, say, take_no_more, write
from .terminal.log import log, without_secrets

# EX_SOFTWARE of sysexits.h.
_INTERNAL: Final = 70

# name → summary in the group's help. Kept here, so that help does not import the commands.
COMMANDS = {
    "convert": "Quantize a checkpoint directory to a W4A8 (or W8A8, or float) artifact.",
    "verify": "Check that an artifact is all that its format promises and both engines need.",
    "inspect": "Show tensors, schemes, sizes and errors of a checkpoint or artifact, by role.",
    "push": "Push an artifact to a hub, resumably; only what changed is sent.",
    "pull": "Fetch an artifact from a hub, resumably, every file checked.",
    "generate": "Generate text with an artifact or a float checkpoint.",
    "serve": "Serve a model to clients of OpenAI's HTTP protocol.",
    "chat": "Talk to a model, in this process or behind a server's URL.",
    "evaluate": "Measure perplexity, and the divergence from the float source.",
    "report": "Write one HTML page about an artifact: sizes, errors, scales, calibration, provenance.",
    "doctor": "Show the parts of the Ascend backend found here, and whether a model can run on an NPU.",
}


class ClosedPipeError(NpuqError):
    """The peer of a pipe or connection other than stdout closed it."""


class LazyGroup(click.Group):
    """Finds `npuq NAME` in `npuq.cli.NAME.command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f".{name}", __package__).command
        command.short_help = COMMANDS[name]
        command.epilog = epilog(EXAMPLES[name])
        ctx.ensure_object(Settings).command = name
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            # click would take any closed pipe for stdout's, a connection's too, and end silently.
            raise ClosedPipeError(str(error)) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _print_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        from ..native.library import description

        write(f"npuq, version {__version__}, {description()}\n")
        ctx.exit()


def _want_traceback(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    ctx.ensure_object(Settings).traceback = asked


def _open_log(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None or ctx.resilient_parsing:
        return
    ranks = ctx.ensure_object(Settings).ranks
    rank = 0 if ranks is None or ranks.launch.size == 1 else ranks.launch.rank
    try:
        log.open(path, f"rank {rank}: " if rank else "")
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror or error}", ctx, param_hint="--log-file") from error
    log.add(f"npuq {__version__}: npuq {shlex.join(without_secrets(sys.argv[1:]))}")


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
@click.option(
    "--traceback",
    is_flag=True,
    expose_value=False,
    callback=_want_traceback,
    help="Before an error also print where in the code it comes from.",
)
@click.option(
    "--log-file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_open_log,
    help="Append to FILE what the command tells: notes, progress, results, errors, each line with its time.",
)
@click.pass_context
def group(context: click.Context) -> None:
    """Convert DeepSeek-style mixture-of-experts checkpoints to W4A8 for Ascend NPUs, check the result, and run it."""
    ranks = context.ensure_object(Settings).ranks
    if ranks is not None:
        ranks.check(context.invoked_subcommand)


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 bad input or a failed check, 2 wrong usage, 70 a fault of npuq's own, 130 interrupted; 128
    plus the signal's number for a conversion ended by a signal, and for ranks ended by one.
    """
    _set_up_streams()
    # torch would import torch_npu by itself, and no command could run where that fails, aborts or hangs. The Ascend
    # backend imports torch_npu when it is chosen.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    _set_up_warnings()
    settings = Settings()
    code: int | str | None = 0
    began = time.monotonic()
    try:
        settings.ranks = CommandRanks(Launch.of(os.environ), lambda error: _end(error, settings))
        group.main(prog_name="npuq", standalone_mode=False, obj=settings)
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        code = _end(error, settings)[1] if settings.ranks is None else settings.ranks.end(error)
    log.add(f"exit status {code or 0} after {time.monotonic() - began:.1f} s")
    log.close()
    flush(sys.stdout)
    flush(sys.stderr)
    if code:
        sys.exit(code)


def _end(error: BaseException, settings: Settings) -> tuple[str, int]:
    """Report the end of the command in a line, under --json as a document too; return the line and the exit code.

    No error becomes a traceback, of whatever kind, and in whatever state the streams are.
    """
    message, code = _described(error, settings)
    if settings.traceback:
        trace = "".join(traceback.format_exception(error))
        log.add(trace)
        complain(trace)
    if isinstance(error, OutputError):
        take_no_more(sys.stdout)
        # Silent for `npuq inspect … | head`.
        if not error.reader_is_gone:
            say(f"npuq: error: {message}")
        return message, code
    line = one_line(" ".join(message.split()))
    if isinstance(error, click.ClickException):  # wrong usage, with a line on how to use it
        said = io.StringIO()
        error.show(said)
        log.add(said.getvalue())
        complain(said.getvalue())
    else:
        say(f"npuq: error: {line}")
    # A command line that cannot be parsed has left its options unread.
    if (settings.json or (isinstance(error, click.UsageError) and "--json" in sys.argv)) and not settings.emitted:
        try:
            emit_error(type(error).__name__, line, code, error.details if isinstance(error, NpuqError) else {})
        except OutputError:
            take_no_more(sys.stdout)
    return line, code


def _described(error: BaseException, settings: Settings) -> tuple[str, int]:
    """A message for the error, and the exit code."""
    if isinstance(error, click.ClickException):
        return error.format_message(), error.exit_code
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return "interrupted", 130
    if isinstance(error, NpuqError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        # An error of the operating system (a name that is too long, a directory without permission) names its file.
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror or error}", 1
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):  # torch's
        return "out of memory" + ("; lower --max-memory or --workers" if settings.command == "convert" else ""), 1
    for device in ("CUDA", "NPU"):  # torch's and torch_npu's words, of a RuntimeError
        if str(error).startswith(f"{device} out of memory"):
            return f"{device} out of memory" + ("; lower --workers" if settings.command == "convert" else ""), 1
    # BaseException too: a panic within a library written in Rust is one.
    text = f"internal error: {type(error).__name__}: {error}"
    return f"{text}; please report it, with what `npuq --traceback …` prints", _INTERNAL


def _set_up_warnings() -> None:
    """Print npuq's warnings as a line on stderr, without the place in the code; all others as Python does."""
    show = warnings.showwarning

    def showwarning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, NpuqWarning):
            say(f"npuq: {one_line(' '.join(str(message).split()))}")
        else:
            show(message, category, *place, **more)

    warnings.showwarning = showwarning


def _set_up_streams() -> None:
    """Make the standard streams safe. Characters that the terminal's encoding lacks (GBK, Latin-1, ASCII) and names
    that are not UTF-8 are printed as escapes and do not fail. The number of a closed stream is filled with /dev/null:
    the next file opened would get it, and with it the output of libraries."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # the lowest free number
        continue
    os.close(number)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  (stays open)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # another type under a test runner
            stream.reconfigure(errors="backslashreplace")
