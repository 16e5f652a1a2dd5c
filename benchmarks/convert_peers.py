"""int4 per channel beside llm-compressor's and msmodelslim's quantizers: speed and squared error on the same tensors.

    P=build/peers
    python -m venv $P/llmcompressor && $P/llmcompressor/bin/pip install llmcompressor
    python -m venv $P/msmodelslim && $P/msmodelslim/bin/pip install msmodelslim==26.1.0 transformers==5.17.0
    python benchmarks/convert_peers.py [--peers build/peers] [--rows 2048] [--threads 2] [--json]

Each peer quantizes bf16 matrices in memory to codes and scales in memory, with its own classes in its own environment
(peers/quantizers.py): llm-compressor's `memoryless_mse` and `memoryless_minmax` observers with compressed-tensors'
`quantize`, and msmodelslim's weight quantizers `ssz` and `minmax`. npuq's time includes packing the codes, summing
scale_bias and measuring the error, on as many threads. Each tool passes over the matrices until `--seconds` have
passed, at least once: one pass of a fast tool ends before the system has spread its threads over the cores. Errors are
Σ (w − s·q)² / Σ w² in float64, from each tool's codes and scales. The environments need a torch of their own; on a
machine without a GPU install torch's CPU build there first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from npuq.formats.int4 import unpack_int4
from npuq.formats.schemes import BIAS, SCALE, WEIGHT, Scheme, quantize_stored
from npuq.native import binding as native
from npuq.quant.scales import Method
from npuq.quant.stored_rows import StoredRows

PEERS = ("llmcompressor", "msmodelslim")
WIDTHS = (7168, 2048)  # DeepSeek-V3's gate/up and down projections
CHUNK = 1 << 20


@dataclass(frozen=True)
class Row:
    """Row of one tool and method: weights a second, squared error over squared norm, ratios to npuq's row."""

    tool: str
    method: str
    weights_per_s: float
    relative_error: float
    slower: float
    more_error: float
    worse_rows: int  # number of rows with a larger squared error of npuq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="holds an environment for each peer")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="that each tool and method takes at least")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    weights = {"0": _normal(64, WIDTHS[1]), **{f"{1 + i}": _normal(options.rows, k) for i, k in enumerate(WIDTHS)}}
    rows = [row for method in ("minmax", "mse") for row in measure(weights, method, options)]
    if options.json:
        print(json.dumps({"kernels": native.description(), "rows": [asdict(row) for row in rows]}, indent=2))
        return
    print(f"{options.rows} rows of {WIDTHS[0]} and of {WIDTHS[1]}, {options.threads} threads, {native.description()}")
    print(
        "tool           method  M weights/s  npuq is faster by  squared error  times npuq's  rows where npuq is worse"
    )
    for row in rows:
        print(
            f"{row.tool:13}  {row.method:6}  {row.weights_per_s / 1e6:11.1f}  {row.slower:17.1f}  "
            f"{row.relative_error:13.6f}  {row.more_error:12.4f}  {row.worse_rows:24}"
        )


def measure(weights: dict[str, Tensor], method: str, options: argparse.Namespace) -> list[Row]:
    """Measure npuq, then each peer whose environment exists."""
    count = sum(weight.numel() for name, weight in weights.items() if name != "0")
    seconds, own = run_npuq(weights, Method(method), options)
    rate, errors = count / seconds, row_errors(weights, own)
    norm = sum(float(weight.double().square().sum()) for name, weight in weights.items() if name != "0")
    rows = [Row("npuq", method, rate, float(errors.sum()) / norm, 1, 1, 0)]
    for peer in PEERS:
        python = options.peers / peer / "bin" / "python"
        if not python.exists():
            print(f"{peer}: no environment at {python}; see --help")
            continue
        seconds, theirs = run_peer(python, peer, method, weights, options)
        found = row_errors(weights, theirs)
        # Both are float64 sums of the same kind: differences below their rounding count as equal.
        worse = int((errors > found * (1 + 1e-6)).sum())
        total = float(found.sum())
        rows.append(
            Row(peer, method, count / seconds, total / norm, seconds * rate / count, total / float(errors.sum()), worse)
        )
    return rows


def run_npuq(
    weights: dict[str, Tensor], method: Method, options: argparse.Namespace
) -> tuple[float, dict[str, Tensor]]:
    """Run npuq: seconds a pass over all matrices but the first, and codes and scales of each."""
    result, passes = {}, 0
    with ThreadPoolExecutor(options.threads) as pool:

        def parts(weight: Tensor) -> list[dict[str, Tensor]]:
            chunks = weight.split(CHUNK // weight.shape[1] // 2 * 2)
            return list(pool.map(lambda rows: _quantize(rows, method), chunks))

        parts(weights["0"])
        started = time.perf_counter()
        while not passes or time.perf_counter() - started < options.seconds:
            done = {name: parts(weight) for name, weight in weights.items() if name != "0"}
            passes += 1
        seconds = (time.perf_counter() - started) / passes
    for name, found in done.items():
        result[name + ".codes"] = unpack_int4(torch.cat([part[WEIGHT] for part in found]))
        result[name + ".scale"] = torch.cat([part[SCALE] for part in found])
    return seconds, result


def _quantize(rows: Tensor, method: Method) -> dict[str, Tensor]:
    done = quantize_stored(StoredRows(rows), Scheme.W4A8, method, row_parallel=True)
    return {name: done.tensors[name] for name in (WEIGHT, SCALE, BIAS)}


def run_peer(
    python: Path, peer: str, method: str, weights: dict[str, Tensor], options: argparse.Namespace
) -> tuple[float, dict[str, Tensor]]:
    """Run a peer: seconds a pass, codes and scales. Raises SystemExit with the output of a peer that fails."""
    script = Path(__file__).parent / "peers/quantizers.py"
    with tempfile.TemporaryDirectory(prefix="npuq-") as folder:
        source, target = Path(folder) / "weights.safetensors", Path(folder) / "codes.safetensors"
        save_file(weights, source)
        # Isolated: the peer must not import modules beside the script.
        limits = [str(options.threads), str(options.seconds)]
        command = [str(python), "-I", str(script), peer, method, str(source), str(target), *limits]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{peer}: {done.stderr[-2000:]}")
        return float(done.stdout.split()[-1]), load_file(target)


def row_errors(weights: dict[str, Tensor], result: dict[str, Tensor]) -> Tensor:
    """Squared errors Σ (w − s·q)² of every row of every matrix but the first, float64."""
    found = []
    for name, weight in sorted(weights.items()):
        if name != "0":
            restored = result[name + ".codes"].double() * result[name + ".scale"].double()
            found.append((weight.double() - restored).square().sum(1))
    return torch.cat(found)


def _normal(*shape: int) -> Tensor:
    return (torch.randn(*shape) * 0.02).to(torch.bfloat16)


if __name__ == "__main__":
    main()
