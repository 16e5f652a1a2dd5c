"""`npuq doctor`: checks this machine, and a model, for Ascend NPUs, and gives the reason why they cannot run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .measurements import bench_lines, tuning_lines
from .options.reading import as_option
from .terminal.console import emit_json, format_bytes, json_option, show, size

if TYPE_CHECKING:
    from ..runtime.diagnostics.bench.decode import Bench
    from ..runtime.diagnostics.doctor import Diagnosis
    from ..runtime.diagnostics.model_fit import ModelFit
    from ..runtime.diagnostics.selftest.comparison import Result
    from ..runtime.diagnostics.tune import Tried


@click.command("doctor")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--selftest", is_flag=True, help="Compare every operator with the reference: the NPU's, else the CPU's.")
@click.option(
    "--bench",
    is_flag=True,
    help="Time a decode step of MODEL, or of two random layers as wide as DeepSeek-V3's: whole, and by operator.",
)
@click.option(
    "--tune",
    is_flag=True,
    help="Measure, in MODEL's shapes, what the NPU's grouped matmul should expect, and store it for this user.",
)
@click.option("--sequences", type=click.IntRange(1, 1024), help="With --bench: in the step. [default: 8]")
@click.option(
    "--context", type=click.IntRange(2, 1 << 20), help="With --bench: tokens of each sequence. [default: 1024]"
)
@click.option("--device", default="npu:0", show_default=True, help="The NPU to test.")
@click.option("--plan", is_flag=True, help="Only plan MODEL's memory on several NPUs: layouts, and cache tokens left.")
@click.option(
    "--devices", type=click.IntRange(1, 1024), help="With --plan: how many NPUs. [default: this machine's, or 8]"
)
@click.option("--memory", type=size, help="With --plan: memory of each. [default: this machine's NPUs', or 64GB]")
@click.option("--recipe", help="With --plan, for a float checkpoint: the recipe of the artifact. [default: w4a8]")
@as_option("MODEL")
@json_option("Print one JSON document.")
def command(
    model: Path | None,
    selftest: bool,
    bench: bool,
    tune: bool,
    sequences: int | None,
    context: int | None,
    device: str,
    plan: bool,
    devices: int | None,
    memory: int | None,
    recipe: str | None,
    family: str | None,
    as_json: bool,
) -> None:
    """Show versions, CANN, driver, devices and operators, and whether MODEL can run on the NPUs.

    A machine without an NPU is reported and is no failure (exit 0); --selftest and --bench then run on the CPU. Exit 1:
    MODEL cannot run on an NPU, or an operator of the self-test disagrees with the reference.

    With --plan, MODEL is a directory, user/repo, whose headers alone are fetched, or a config.json by itself. Exit 1:
    none of npuq's own layouts fits.
    """
    for option, count in (("--sequences", sequences), ("--context", context)):
        if count is not None and not bench:
            raise click.UsageError(f"{option} is for a measurement: add --bench")
    if plan:
        if selftest or bench or tune:
            raise click.UsageError("--plan runs nothing: leave --selftest, --bench and --tune out")
        _plan(model, family, recipe, devices, memory, as_json)
        return
    for option, value in (("--devices", devices), ("--memory", memory), ("--recipe", recipe)):
        if value is not None:
            raise click.UsageError(f"{option} is for a plan: add --plan")
    if family is not None and model is None:
        raise click.UsageError("--as is about MODEL: give one")
    if tune and model is None:
        raise click.UsageError("--tune measures in the shapes of a model: give MODEL")
    from ..runtime.diagnostics.doctor import examine

    report = examine(model, family)
    if not as_json:
        _print(report)
    results = _selftest(report, device) if selftest else []
    if selftest and not as_json:
        _print_selftest(report, results)
    tuning = _tune(report, model, device) if tune and model is not None else None
    if tuning is not None and not as_json:
        show(*tuning_lines(*tuning))
    measured = _bench(report, model, device, sequences or 8, context or 1024) if bench else None
    if measured is not None and not as_json:
        show(*bench_lines(measured))
    if as_json:
        document = report.as_json()
        if selftest:
            document["selftest"] = _as_json(report, results)
        if tuning is not None:
            document["tuning"] = {"file": str(tuning[0]), "choices": [tried.as_json() for tried in tuning[1]]}
        if measured is not None:
            document["bench"] = measured.as_json()
        emit_json(document)
    if (report.model is not None and not report.model.runs) or not all(result.passed for result in results):
        sys.exit(1)


def _plan(
    model: Path | None, family: str | None, recipe: str | None, devices: int | None, memory: int | None, as_json: bool
) -> None:
    if model is None:
        raise click.UsageError("--plan needs MODEL")
    if memory == 0:
        raise click.BadParameter("a device has some memory", param_hint="--memory")
    from .memory_plan import plan_of, print_plan

    found = plan_of(model, family, recipe or "w4a8", devices, memory)
    if as_json:
        emit_json({"path": str(model), **found.as_dict()})
    else:
        print_plan(found)
    if found.recommended is None:
        sys.exit(1)


def _selftest(report: Diagnosis, device: str) -> list[Result]:
    from ..runtime.backend import make_ops
    from ..runtime.diagnostics.selftest.comparison import selftest

    return list(selftest(make_ops("ascend", device=device) if report.ready else make_ops("cpu")))


def _bench(report: Diagnosis, model: Path | None, device: str, sequences: int, context: int) -> Bench:
    from ..runtime.diagnostics.bench.decode import bench_model, bench_random

    backend, where = ("ascend", device) if report.ready else ("cpu", None)
    if model is None:
        return bench_random(backend, where, sequences, context)
    return bench_model(model, backend, where, sequences, context)


def _tune(report: Diagnosis, model: Path, device: str) -> tuple[Path, list[Tried]]:
    """Measure and store: the file, and what was tried."""
    from ..errors import BackendError
    from ..runtime.diagnostics.tune import store_tuning, tune, untuned_ops

    if not report.ready:
        raise BackendError(f"--tune measures an NPU, and none can be used here: {report.problem}")
    tried = list(tune(model, untuned_ops(device)))
    return store_tuning(tried, device), tried


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
                "findings": list(result.findings),
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
        show(f"{report.model.path} {_verdict(report.model)}")
        for problem in report.model.problems:
            show(f"{'':10} {problem}")


def _verdict(model: ModelFit) -> str:
    if not model.runs:
        return "cannot run on an NPU:"
    if model.devices == 1:
        return "would run on an NPU"
    size = format_bytes(model.device_bytes)
    return (
        f"would run on {model.devices} NPUs of {size}: "
        f"torchrun --nproc-per-node {model.devices} -m npuq generate … --parallel {model.layout}"
    )


def _print_selftest(report: Diagnosis, results: list[Result]) -> None:
    show(f"Self-test of the {_tested(report)} backend against the reference:")
    for result in results:
        line = result.message or f"error {result.error:.1e}, at most {result.tolerance:.0e} is allowed"
        show(f"  {'ok  ' if result.passed else 'FAIL'} {result.operator:38} {line}")
        for finding in result.findings:
            show(f"{'':7}{finding}")
    failed = sum(not result.passed for result in results)
    show(f"{len(results) - failed} of {len(results)} agree.")
