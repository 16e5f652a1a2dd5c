"""`npuq doctor`: checks this machine, and a model, for Ascend NPUs, and gives the reason why they cannot run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .measurements import bench_lines
from .terminal.console import emit_json, format_bytes, json_option, show

if TYPE_CHECKING:
    from ..runtime.diagnostics.bench.decode import Bench
    from ..runtime.diagnostics.doctor import Diagnosis
    from ..runtime.diagnostics.selftest import Result


@click.command("doctor")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--selftest", is_flag=True, help="Compare every operator with the reference: the NPU's, else the CPU's.")
@click.option(
    "--bench",
    is_flag=True,
    help="Time a decode step of MODEL, or of two random layers as wide as DeepSeek-V3's: whole, and by operator.",
)
@click.option("--sequences", type=click.IntRange(1, 1024), default=8, show_default=True, help="With --bench.")
@click.option(
    "--context",
    type=click.IntRange(2, 1 << 20),
    default=1024,
    show_default=True,
    help="With --bench: tokens of each sequence.",
)
@click.option("--device", default="npu:0", show_default=True, help="The NPU to test.")
@json_option("Print one JSON document.")
def command(
    model: Path | None,
    selftest: bool,
    bench: bool,
    sequences: int,
    context: int,
    device: str,
    as_json: bool,
) -> None:
    """Show versions, CANN, driver, devices and operators, and whether MODEL can run on an NPU.

    A machine without an NPU is reported and is no failure (exit 0); --selftest and --bench then run on the CPU. Exit 1:
    MODEL cannot run on an NPU, or an operator of the self-test disagrees with the reference.
    """
    from ..runtime.diagnostics.doctor import examine

    report = examine(model)
    if not as_json:
        _print(report)
    results = _selftest(report, device) if selftest else []
    if selftest and not as_json:
        _print_selftest(report, results)
    measured = _bench(report, model, device, sequences, context) if bench else None
    if measured is not None and not as_json:
        show(*bench_lines(measured))
    if as_json:
        parts = {"selftest": _as_json(report, results) if selftest else None}
        parts["bench"] = None if measured is None else measured.as_json()
        emit_json({**report.as_json(), **{name: part for name, part in parts.items() if part is not None}})
    if (report.model is not None and not report.model.runs) or not all(result.passed for result in results):
        sys.exit(1)


def _selftest(report: Diagnosis, device: str) -> list[Result]:
    from ..runtime.backend import make_ops
    from ..runtime.diagnostics.selftest import selftest

    return list(selftest(make_ops("ascend", device=device) if report.ready else make_ops("cpu")))


def _bench(report: Diagnosis, model: Path | None, device: str, sequences: int, context: int) -> Bench:
    from ..runtime.diagnostics.bench.decode import bench_model, bench_random

    backend, where = ("ascend", device) if report.ready else ("cpu", None)
    if model is None:
        return bench_random(backend, where, sequences, context)
    return bench_model(model, backend, where, sequences, context)


def _tested(report: Diagnosis) -> str:
    return "ascend" if report.ready else "cpu"


def _as_json(report: Diagnosis, results: list[Result]) -> dict[str, Any]:
    return {
        "backend": _tested(report),
        "operators": [
            {
                "operator": result.operator,
                "passed": result.passed,
                # JSON has no infinity: `passed` and this message stand for an error that is not finite.
                "error": result.error if result.error is not None and result.error != float("inf") else None,
                "tolerance": result.tolerance,
                "message": result.message
                or ("not finite, or of another shape" if result.error == float("inf") else ""),
            }
            for result in results
        ],
    }


def _print(report: Diagnosis) -> None:
    rows = {
        "npuq": report.npuq,
        "python": f"{report.python} on {report.platform}",
        "cpu": report.kernels,
        "torch": report.torch,
        "torch_npu": report.torch_npu,
        "CANN": report.cann,
        "driver": report.driver,
    }
    for name, value in rows.items():
        show(f"{name:10} {value or 'not found'}")
    for device in report.devices:
        memory = f"{format_bytes(device.free_memory_bytes)} of {format_bytes(device.total_memory_bytes)} free"
        show(f"npu:{device.index:<6} {device.name}, {device.family or 'unknown family'}, {memory}")
        if device.problem:
            show(f"{'':10} {device.problem}")
    missing = [name for name, schema in report.operators.items() if schema is None]
    if report.operators:
        show(f"operators  {len(report.operators) - len(missing)} of {len(report.operators)} are there")
        for name in missing:
            show(f"{'':10} missing: {name}")
    if report.ready:
        show("The ascend backend can run here.")
    else:
        show(f"No Ascend NPU can be used here: {report.problem}. The cpu backend can run here.")
    if report.model is not None:
        verdict = "would run on an NPU" if report.model.runs else "cannot run on an NPU:"
        show(f"{report.model.path} {verdict}")
        for problem in report.model.problems:
            show(f"{'':10} {problem}")


def _print_selftest(report: Diagnosis, results: list[Result]) -> None:
    show(f"Self-test of the {_tested(report)} backend against the reference:")
    for result in results:
        line = result.message or f"error {result.error:.1e}, at most {result.tolerance:.0e} is allowed"
        show(f"  {'ok  ' if result.passed else 'FAIL'} {result.operator:38} {line}")
    failed = sum(not result.passed for result in results)
    show(f"{len(results) - failed} of {len(results)} agree.")
