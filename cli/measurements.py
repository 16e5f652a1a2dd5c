"""What `npuq doctor` has measured, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .terminal.console import format_bytes

if TYPE_CHECKING:
    from ..runtime.diagnostics.bench.decode import Bench
    from ..runtime.diagnostics.tune import Tried


def bench_lines(bench: Bench) -> Iterator[str]:
    """A decode step: its operators, the most expensive first, then the whole."""
    where = f"{bench.backend} on {bench.device}"
    yield f"Decode step of {bench.model}: {bench.sequences} sequences of {bench.context} tokens, {where}."
    if bench.emulated:
        yield "This NPU is EMULATED on the CPU: its times say nothing about an NPU."
    yield f"{'operator':28} {'calls':>5} {'µs a call':>10} {'ms a step':>10} {'bytes':>9} {'GB/s':>7}  shapes"
    for each in bench.operators:
        yield (
            f"{each.operator:28} {each.calls:5} {each.seconds * 1e6:10.1f} {each.step_seconds * 1e3:10.3f} "
            f"{format_bytes(each.bytes):>9} {_rate(each.bytes, each.seconds):>7}  {each.shapes}"
        )
    total = sum(each.step_seconds for each in bench.operators)
    yield f"{'sum of operators':28} {'':5} {'':10} {total * 1e3:10.3f}"
    for name, seconds in (("step, eager", bench.eager_seconds), ("step, graph", bench.graph_seconds)):
        if seconds is None:
            yield f"{name:28} {'':5} {'':10} {'none':>10}"
        else:
            rate = f"{bench.sequences / seconds:.1f} tokens/s"
            yield (
                f"{name:28} {'':5} {'':10} {seconds * 1e3:10.3f} {format_bytes(bench.bytes):>9} "
                f"{_rate(bench.bytes, seconds):>7}  {rate}"
            )
    yield "An operator's time is without that of the operators it calls; bytes are those it must move at least."


def tuning_lines(path: Path, tried: Iterable[Tried]) -> Iterator[str]:
    """Times of the grouped matmul, and the choices stored."""
    yield f"{'grouped matmul':46} {'µs: told nothing':>16} {'the mean':>10} {'to expand':>10}  choice"
    for each in tried:
        shape = each.shape
        name = f"W{shape.bits}A8, {shape.experts} experts {shape.inputs} → {shape.outputs}, {shape.rows} rows"
        times = {expectation.value: f"{seconds * 1e6:.1f}" for expectation, seconds in each.seconds.items()}
        columns = (times.get(expectation, "-") for expectation in ("none", "mean", "expanded"))
        yield "{:46} {:>16} {:>10} {:>10}  {}".format(name, *columns, each.choice.value)
    yield f"Stored in {path}; the ascend backend reads it when it starts."


def _rate(moved: int, seconds: float) -> str:
    return f"{moved / seconds / 1e9:.1f}" if seconds else "-"
