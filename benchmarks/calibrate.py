"""Calibration at DeepSeek-V3's size: CPU seconds and peak memory by part, and what a whole V3 would take by them.

    python benchmarks/calibrate.py [--threads 1] [--tokens 2048] [--before] [--llm-compressor PYTHON]
        [--only expert dense] [--level avx2] [--torch] [--json]

One routed expert (gate and up [2048, 7168], down [7168, 2048]) on `--tokens` routed tokens runs whole, by the code that
converts it. Linears of attention and of the dense block run on some rows and tokens; their time grows with both, and is
scaled to all rows and 65536 tokens. With `--threads`, so many experts run at once, and their wall time is given too.

Inputs are correlated, with channels of very different size; weights are Gaussian. `--before` runs the algorithm that
npuq had before (GPTQ by the factor of the inverse, then two sweeps, all in float64 by torch) on 128 rows of each linear
of the expert: its squared error beside ours, and its time, scaled to all rows. PYTHON is one with llmcompressor: its
GPTQ of the same weights on the same inputs, on as many threads.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure.machine import as_json
from peers.gptq_before import before
from torch import Tensor

from npuq.convert.calibrate.layers.experts import quantize_expert
from npuq.convert.calibrate.layers.linears import Linears
from npuq.convert.calibrate.layers.operators import CalibrationOps, float_mlp, round_inputs
from npuq.formats.schemes import SCALE, Scheme, quantize_stored
from npuq.native.calibration import NativeArithmetic, calibration_arithmetic
from npuq.native.library import description
from npuq.parallel.pool import Inline
from npuq.quant.arithmetic import Arithmetic, TorchArithmetic
from npuq.quant.hessian import Hessian, factor
from npuq.quant.refine import calibrated_codes
from npuq.quant.scales import Method
from npuq.quant.stored_rows import StoredRows

HIDDEN, INTERMEDIATE, EXPERTS = 7168, 2048, 256
LAYERS, DENSE_LAYERS, ALL_TOKENS = 61, 3, 65536
# Linears of a decoder layer beside its routed experts: (name, outputs, inputs, how many layers have it). Those of one
# Hessian are together.
LINEARS = (
    ("q_a|kv_a", 1536 + 576, HIDDEN, LAYERS),
    ("q_b", 128 * 192, 1536, LAYERS),
    ("o", HIDDEN, 128 * 128, LAYERS),
    ("dense gate|up", 2 * 18432, HIDDEN, DENSE_LAYERS),
    ("dense down", HIDDEN, 18432, DENSE_LAYERS),
    ("shared gate|up", 2 * INTERMEDIATE, HIDDEN, LAYERS - DENSE_LAYERS),
    ("shared down", HIDDEN, INTERMEDIATE, LAYERS - DENSE_LAYERS),
)
SOME_ROWS, SOME_TOKENS, BEFORE_ROWS = 512, 2048, 128
INLINE = Inline(threading.Event())


def inputs(tokens: int, channels: int, seed: int) -> Tensor:
    """Correlated activations float32 [tokens, channels], some channels twenty times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, channels // 8)
    x = torch.randn(tokens, rank, generator=generator) @ torch.randn(rank, channels, generator=generator) / rank**0.5
    x += 0.5 * torch.randn(tokens, channels, generator=generator)
    x *= torch.exp(0.6 * torch.randn(channels, generator=generator))
    x[:, torch.randperm(channels, generator=generator)[: max(1, channels // 1000)]] *= 20
    return x


def weight(outputs: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = 0.02 * torch.exp(0.3 * torch.randn(outputs, 1, generator=generator))
    return rows * torch.randn(outputs, columns, generator=generator)


class Parts:
    """CPU seconds of the calling thread, by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.thread_time()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.thread_time() - began

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            with self(name):
                return function(*arguments, **named)

        return timed


class RecordingLinears(Linears):
    """Linears without files that keep what each is quantized to."""

    def __init__(self, arithmetic: Arithmetic):
        super().__init__(None, arithmetic)
        self.found: dict[str, Any] = {}

    def quantize(self, job: Any, *arguments: Any) -> Any:
        linear, result = super().quantize(job, *arguments)
        self.found[job.source] = linear
        return linear, result


def expert_weights(seed: int) -> list[Tensor]:
    return [
        weight(INTERMEDIATE, HIDDEN, seed),
        weight(INTERMEDIATE, HIDDEN, seed + 1),
        weight(HIDDEN, INTERMEDIATE, seed + 2),
    ]


def run_expert(arithmetic: Arithmetic, x: Tensor, seed: int) -> tuple[RecordingLinears, Any]:
    """Quantize an expert by the code of a conversion."""
    linears = RecordingLinears(arithmetic)
    walk = SimpleNamespace(
        pool=SimpleNamespace(inline=INLINE), expert_linears=linears, ops=CalibrationOps(arithmetic), smooth=False
    )
    jobs = tuple(
        SimpleNamespace(
            source=name, index=index, scheme=Scheme.W4A8, method=Method.GPTQ, row_parallel=name == "down", outputs=()
        )
        for index, name in enumerate(("gate", "up", "down"))
    )
    layer: Any = SimpleNamespace(walk=walk)
    return linears, quantize_expert(layer, jobs, (x, x), x[:0], expert_weights(seed))  # type: ignore[arg-type]


def measure_expert(arithmetic: Arithmetic, tokens: int, threads: int) -> dict[str, Any]:
    """One expert on each thread: CPU seconds of one by part, wall seconds of all, and each linear's squared error."""
    import npuq.convert.calibrate.layers.experts as experts
    import npuq.convert.calibrate.layers.linears as linears

    x = inputs(tokens, HIDDEN, 0)
    run_expert(arithmetic, x[:64], 1)  # warm
    parts = Parts()
    kept = Hessian.add, experts.factored, linears.calibrated_codes, linears._round
    Hessian.add = parts.wrapped("Hessian", Hessian.add)  # type: ignore[method-assign]
    experts.factored = parts.wrapped("factor", experts.factored)
    linears.calibrated_codes = parts.wrapped("codes", linears.calibrated_codes)
    linears._round = parts.wrapped("mse scales", linears._round)
    try:
        began, cpu = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(lambda index: run_expert(arithmetic, x, 1 + 3 * index)[0], range(threads)))
        cpu, wall = (time.process_time() - cpu) / threads, time.perf_counter() - began
    finally:
        Hessian.add, experts.factored, linears.calibrated_codes, linears._round = kept  # type: ignore[method-assign]
    seconds = {name: value / threads for name, value in parts.seconds.items()}
    seconds["forward and the rest"] = cpu - sum(seconds.values())
    errors = {name: linear.error**2 for name, linear in found[0].found.items()}
    return {"cpu_s": cpu, "wall_s": wall, "experts": threads, "parts": seconds, "squared_error": errors}


def expert_inputs(arithmetic: Arithmetic, tokens: int) -> tuple[Tensor, Tensor]:
    """The rounded inputs of gate and up, and those of down behind the float gate and up."""
    x = inputs(tokens, HIDDEN, 0)
    inner = CalibrationOps(arithmetic).routing.mlp_inner(x, float_mlp(expert_weights(1)))
    return round_inputs(x, Scheme.W4A8, None), round_inputs(inner, Scheme.W4A8, None)


def scales(rows: Tensor) -> Tensor:
    return quantize_stored(StoredRows(rows), Scheme.W4A8, Method.MSE, row_parallel=False).tensors[SCALE][:, 0]


def measure_before(arithmetic: Arithmetic, tokens: int) -> dict[str, Any]:
    """Squared errors of both algorithms on some rows of an expert's linears, and the earlier one's time."""
    x, inner = expert_inputs(arithmetic, tokens)
    gate, up, down = expert_weights(1)
    found: dict[str, Any] = {"cpu_s": 0.0, "squared_error": {}, "now": {}}
    for name, rows, columns, shares in (("gate", gate, x, 1.0), ("up", up, x, 0.0), ("down", down, inner, 1.0)):
        some = rows[:BEFORE_ROWS]
        result, factoring, rounding = before(some, columns, scales(some), 4)
        found["cpu_s"] += shares * factoring + rounding * rows.shape[0] / BEFORE_ROWS
        found["squared_error"][name] = result
        hessian = Hessian(columns.shape[1], arithmetic)
        hessian.add(columns, INLINE)
        now = calibrated_codes(some, factor(hessian.symmetric(), arithmetic, INLINE), scales(some), 4, arithmetic)
        found["now"][name] = float(now.squared_error.sum() / now.squared_norm.sum())
    return found


def measure_linears(arithmetic: Arithmetic) -> list[dict[str, Any]]:
    """CPU seconds of each linear beside the experts: measured on some rows and tokens, scaled to all."""
    found = []
    for name, outputs, columns, layers in LINEARS:
        x = round_inputs(inputs(SOME_TOKENS, columns, 2), Scheme.W8A8, None)
        rows = weight(SOME_ROWS, columns, 3)
        seconds = []
        hessian = Hessian(columns, arithmetic)

        def timed(function: Callable[[], Any], seconds: list[float] = seconds) -> Any:
            began = time.process_time()
            result = function()
            seconds.append(time.process_time() - began)
            return result

        timed(lambda: hessian.add(x, INLINE))  # noqa: B023
        factored = timed(lambda: factor(hessian.symmetric(), arithmetic, INLINE))  # noqa: B023
        scale = quantize_stored(StoredRows(rows), Scheme.W8A8, Method.MSE, row_parallel=False).tensors[SCALE][:, 0]
        timed(lambda: calibrated_codes(rows, factored, scale, 8, arithmetic))  # noqa: B023
        timed(lambda: (arithmetic.linear(x, rows), arithmetic.linear(x, rows)))  # noqa: B023
        hessian_s, factor_s, codes_s, forward_s = seconds
        more_rows, more_tokens = outputs / SOME_ROWS, ALL_TOKENS / SOME_TOKENS
        parts = {
            "Hessian": hessian_s * more_tokens,
            "factor": factor_s,
            "codes": codes_s * more_rows,
            "forward": forward_s * more_rows * more_tokens,
        }
        found.append({"linear": name, "layers": layers, "cpu_s": sum(parts.values()), "parts": parts})
    return found


def measure_llm_compressor(python: str, tokens: int, threads: int) -> dict[str, Any]:
    """The expert through llm-compressor's GPTQ, in its own process; its squared errors by our inputs."""
    x, inner = expert_inputs(calibration_arithmetic(), tokens)
    gate, up, down = expert_weights(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        torch.save({"gate": (gate, x), "up": (up, x), "down": (down, inner)}, path / "expert.pt")
        script = Path(__file__).parent / "peers" / "llm_compressor_expert.py"
        command = [python, str(script), str(path / "expert.pt"), str(path / "found.pt"), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"llm-compressor: {done.stderr.strip().splitlines()[-1]}")
        result = json.loads(done.stdout.splitlines()[-1])
        found = torch.load(path / "found.pt", weights_only=True)
    result["squared_error"] = {
        name: float(
            ((found[name] - rows) @ columns.T).double().square().sum() / (rows @ columns.T).double().square().sum()
        )
        for name, rows, columns in (("gate", gate, x), ("up", up, x), ("down", down, inner))
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--only", nargs="+", choices=("expert", "dense"), default=["expert", "dense"])
    parser.add_argument("--before", action="store_true")
    parser.add_argument("--llm-compressor", metavar="PYTHON")
    parser.add_argument("--level")
    parser.add_argument("--torch", action="store_true", help="by torch's products instead of the native kernels")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    arithmetic = TorchArithmetic() if options.torch else NativeArithmetic(options.level)
    kernels = "torch" if options.torch else options.level or description()
    found: dict[str, Any] = {"kernels": kernels, "tokens": options.tokens, "load": os.getloadavg()[0]}
    if "expert" in options.only:
        found["expert"] = measure_expert(arithmetic, options.tokens, options.threads)
        found["peak_expert_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    if "dense" in options.only:
        found["linears"] = measure_linears(arithmetic)
        found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    if options.before:
        found["before"] = measure_before(arithmetic, options.tokens)
    if options.llm_compressor:
        found["llm_compressor"] = measure_llm_compressor(options.llm_compressor, options.tokens, options.threads)
    if "expert" in found and "linears" in found:
        experts = (LAYERS - DENSE_LAYERS) * EXPERTS * found["expert"]["cpu_s"]
        others = sum(row["layers"] * row["cpu_s"] for row in found["linears"])
        found["whole_v3"] = {"experts_cpu_s": experts, "others_cpu_s": others}
    print(as_json(found) if options.json else table(found))


def table(found: dict[str, Any]) -> str:
    lines = [f"kernels: {found['kernels']}; {found['tokens']} tokens; load {found['load']:.1f}"]
    if "expert" in found:
        expert = found["expert"]
        lines.append(
            f"expert: {expert['cpu_s']:.1f} CPU s each, {expert['wall_s']:.1f} s for {expert['experts']} at once, peak "
            f"{found['peak_expert_bytes'] / 1e9:.1f} GB"
        )
        lines += [f"  {name:<22} {seconds:6.2f}" for name, seconds in expert["parts"].items()]
        lines += [f"  squared error of {name:<5} {error:.4e}" for name, error in expert["squared_error"].items()]
    for row in found.get("linears", []):
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["parts"].items())
        lines.append(f"{row['linear']:<15} {row['cpu_s']:7.1f} CPU s in each of {row['layers']} layers: {parts}")
    if "linears" in found:
        lines.append(f"peak {found['peak_bytes'] / 1e9:.1f} GB")
    if "whole_v3" in found:
        total = sum(found["whole_v3"].values())
        hours = ", ".join(f"{total / 3600 / cores:.1f} h on {cores}" for cores in (2, 64, 192))
        lines.append(
            f"a whole V3 by that, without attention's scores and reading: {total / 3600:.0f} CPU hours; {hours}"
        )
    if "before" in found:
        was = found["before"]
        lines.append(
            f"before: {was['cpu_s']:.0f} CPU s an expert without its forward passes, scaled from {BEFORE_ROWS} rows"
        )
        for name, error in was["squared_error"].items():
            now = was["now"][name]
            lines.append(f"  squared error of {name:<5} {error:.4e}, now {now:.4e} ({now / error - 1:+.2%})")
    if "llm_compressor" in found:
        peer = found["llm_compressor"]
        lines.append(
            f"llm-compressor {peer['version']}: {peer['cpu_s']:.0f} CPU s, {peer['wall_s']:.0f} s on {peer['threads']} "
            "threads"
        )
        lines += [f"  squared error of {name:<5} {error:.4e}" for name, error in peer["squared_error"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
