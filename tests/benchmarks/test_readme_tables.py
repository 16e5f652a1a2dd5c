"""The tables of benchmarks/README.md are made of one JSON, and its markers name tables that exist."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import readme_tables  # noqa: E402
import record as recorder  # noqa: E402
from measure import machine, marked_tables, rounds  # noqa: E402

PAGE = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")


def benchmark(result: dict[str, Any]) -> dict[str, Any]:
    command = "python benchmarks/x.py --llama-cpp /home/me/bin/python --json"
    met = {"load": 0.5, "read_bytes_per_s": 38e9}
    return {"command": command, "wall_s": 60.0, "cpu_s": 90.0, **met, "result": result}


def of_rounds(*figures: dict[str, float]) -> dict[str, Any]:
    """As a script writes them, through JSON."""
    found: dict[str, Any] = json.loads(json.dumps(rounds.summary(figures)))
    return found


RUNTIME = {
    "prompt": 512,
    "batch": 16,
    "peers": ["llama.cpp"],
    **of_rounds(
        *(
            {
                "npuq prefill": 100.0 * n,
                "npuq decode": 10.0 * n,
                "npuq batch": 40.0 * n,
                "batch gain": 4.0,
                "of int8": 0.5,
                "of bandwidth": 0.25 * n,
                "npuq prefill CPU ms": 2.0,
                "npuq decode CPU ms": 50.0,
                "npuq batch CPU ms": 80.0,
                "llama.cpp prefill": 50.0,
                "llama.cpp decode": 5.0,
                "llama.cpp prefill ratio": 2.0 * n,
                "llama.cpp decode ratio": 2.0 * n,
            }
            for n in (1, 2, 3)
        )
    ),
}
SPARSE = of_rounds(
    {"dense ms": 8.0, "full ms": 4.0, "shared ms": 2.0, "full speedup": 2.0, "shared speedup": 4.0},
    {"dense ms": 9.0, "full ms": 3.0, "shared ms": 3.0, "full speedup": 3.0, "shared speedup": 3.0},
)
SERVE = of_rounds(
    {
        "npuq 1 tokens/s": 950.0,
        "npuq 1 first": 0.007,
        "npuq 1 last first": 0.008,
        "npuq 1 whole": 1.0,
        "llama.cpp 16 tokens/s": 20.0,
        "llama.cpp 16 first": 30.0,
        "llama.cpp 16 last first": 60.0,
        "llama.cpp 16 whole": 0.25,
        "library": 3000.0,
        "of the library": 0.75,
        "turn tokens": 3900.0,
        "first turn": 0.5,
        "second turn": 0.1,
        "second of first": 0.2,
    }
)
RECORD: dict[str, Any] = {
    "quick": False,
    "machine": {
        "processor": "AMD EPYC",
        "family": "cpu family 26",
        "levels": ["portable", "avx2", "avx512bf16"],
        "cores": 2,
        "clock_mhz": 2600.0,
        "load": 0.25,
        "read_bytes_per_s": 40e9,
        "versions": {"torch": "2.13.0"},
        "commit": "0123abc",
        "date": "2026-11-30T20:00:00+00:00",
    },
    "benchmarks": {
        "kernels": benchmark(
            {
                "limits": of_rounds({"read": 40e9, "copy": 20e9, "int8": 300e9, "floats": 90e9}),
                "rows": [
                    {"level": level, "what": "W8A8", "unit": "GB/s", "limit": "read", **of_rounds(*values)}
                    for level, values in (
                        ("avx2", [{"value": 20.0, "ratio": 0.5}]),
                        ("avx512bf16", [{"value": 30.0, "ratio": 0.7}, {"value": 32.0, "ratio": 0.9}]),
                    )
                ],
            }
        ),
        "runtime": benchmark(RUNTIME),
        "runtime-qwen3": benchmark({**RUNTIME, "batch": 0, "peers": []}),
        "context": benchmark(
            {
                "peers": ["llama.cpp"],
                "contexts": {"32768": {key: RUNTIME[key] for key in ("rounds", "medians", "spreads")}},
            }
        ),
        "context-32k": benchmark(
            {
                "peers": ["llama.cpp"],
                "contexts": {"32768": {key: RUNTIME[key] for key in ("rounds", "medians", "spreads")}},
            }
        ),
        "convert": benchmark(
            {
                "rows": [
                    {
                        "directory": "/dev/shm",
                        "method": "mse",
                        "source_bytes_per_s": 2.5e9,
                        "source_bytes_per_s_spread": [2.4e9, 2.6e9],
                        "copy_bytes_per_s": 3e9,
                        "of_copy": 0.8,
                        "of_copy_spread": [0.7, 0.9],
                        "cpu_s_per_gb": 0.78,
                        "copy_cpu_s_per_gb": 0.38,
                        "peak_anonymous_bytes": 245e6,
                    }
                ]
            }
        ),
        "calibrate": benchmark(
            {
                "expert": {"cpu_s": 11.7, "parts": {"codes": 6.3}, "squared_error": {"gate": 1.46e-4}},
                "linears": [{"linear": "q_a|kv_a", "cpu_s": 48.0}],
                "llm_compressor": {"version": "0.14", "cpu_s": 27.0, "squared_error": {"gate": 2.92e-4}},
                "whole_v3": {"experts_cpu_s": 7200.0, "others_cpu_s": 3600.0},
            }
        ),
        "attention": benchmark(
            {
                "operators": [
                    {"name": "one token", **of_rounds({"rate": 2e11, "bytes": 1e10, "of bf16": 0.8, "of int8": 0.4})}
                ]
            }
        ),
        "sampling": benchmark(
            {
                "requests": [
                    {
                        "rows": "flat",
                        "request": {"temperature": 1.0, "top_p": 0.95},
                        **of_rounds(
                            {
                                "native ms": 6.0,
                                "native CPU ms": 7.0,
                                "% of V3's step": 0.12,
                                "numpy ms": 15.0,
                                "numpy of native": 2.5,
                            }
                        ),
                    }
                ]
            }
        ),
        "ranks": benchmark(
            {
                "settings": {
                    name: of_rounds(
                        {
                            **dict.fromkeys(("prefill", "decode", "batch", "processor"), 90.0 * part),
                            **{f"{kind} ratio": part for kind in ("prefill", "decode", "batch", "processor")},
                        }
                    )
                    for name, part in (("one process", 1.0), ("ep=2,tp=1", 0.5))
                }
            }
        ),
        "sparse-attention-v32": benchmark({"model": "v32", "contexts": {"1024": SPARSE}}),
        "sparse-attention-glm": benchmark({"model": "glm", "contexts": {"1024": SPARSE}}),
        "serve": benchmark(SERVE),
        "serve-random": benchmark(SERVE),
        "first-token": benchmark(
            of_rounds({"import torch": 1.0, "import torch, beyond torch": 0.0, "import torch, CPU": 1.5})
        ),
    },
}
# Of each table a line that follows from the record by hand.
LINES = {
    "kernels": "| W8A8, GB/s | 20.0 | 31.0 | 0.80 (0.70 to 0.90) of read |",
    "runtime": "| llama.cpp, tokens/s | 50.00 (50.00 to 50.00), npuq 4.00 (2.00 to 6.00) × |"
    " 5.00 (5.00 to 5.00), npuq 4.00 (2.00 to 6.00) × |  |",
    "runtime-qwen3": "| npuq, tokens/s | 200.0 (100.0 to 300.0) | 20.00 (10.00 to 30.00) |",
    "context": "| 32,768 | 200.0 (100.0 to 300.0) | 20.00 (10.00 to 30.00) | 50.0 (50.0 to 50.0) |"
    " 50.00 (50.00 to 50.00), npuq 4.00 (2.00 to 6.00) × | 5.00 (5.00 to 5.00), npuq 4.00 (2.00 to 6.00) × |",
    "context-32k": "| 32,768 | 200.0 (100.0 to 300.0) | 20.00 (10.00 to 30.00) | 50.0 (50.0 to 50.0) |"
    " 50.00 (50.00 to 50.00), npuq 4.00 (2.00 to 6.00) × | 5.00 (5.00 to 5.00), npuq 4.00 (2.00 to 6.00) × |",
    "convert": "| /dev/shm, mse | 2.500 (2.400 to 2.600) | 3.000 | 0.80 (0.70 to 0.90) | 0.78 | 0.38 | 245 MB |",
    "calibrate": "| a whole V3 by that, without attention's scores and reading | 3 hours |  |",
    "attention": "| one token | 200 | 10.0 | 0.80 | 0.40 |",
    "sampling": "| flat, temperature 1, top_p 0.95 | 6.00 | 7.00 | 0.12 | 15.00 | 2.50 |",
    "ranks": "| decode | 90.0 | 45.0; 0.50 × |",
    "sparse-attention": "| 1,024 |"
    + " 8.5 (8.0 to 9.0) ms | 3.5; 2.50 (2.00 to 3.00) × | 2.5; 3.50 (3.00 to 4.00) × |" * 2,
    "serve": "| its second turn |  | 100 | 0.200 of the first |",
    "serve-random": "| llama.cpp 16 clients, 75% of them without an answer in time | 20.0 | 30,000 | 60,000 |",
    "first-token": "| import torch | 1.000 | 0.000 | 1.500 |",
}


ENDLESS = """
import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(sys.argv[1]).write_text(str(child.pid))
print("half done", file=sys.stderr, flush=True)
time.sleep(600)
"""


def page(*markers: str) -> str:
    return "".join(f"<!-- begin of the table: {name} -->\nof today\n{marked_tables.END}\n" for name in markers)


@pytest.mark.parametrize("name", readme_tables.TABLES)
def test_a_table_is_made_of_the_record(name: str) -> None:
    found = readme_tables.with_tables(page(name), RECORD)[0]
    lines = found.splitlines()
    assert LINES[name] in lines
    assert "of today" not in found
    caption = " ".join(lines[1 : lines.index("")])
    assert "`python benchmarks/x.py --llama-cpp …`" in caption
    runs = len(readme_tables.TABLES[name].benchmarks)
    took = f"{60 * runs} s, {90 * runs} CPU seconds"
    for said in ("AMD EPYC", "2.6 GHz", "avx512bf16", "38.0 GB/s", "load 0.5", "commit 0123abc, 2026-11-30", took):
        assert said in caption
    columns = {line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}
    assert len(columns) == 1, "rows of different width"


def test_tables_that_the_record_lacks_stay() -> None:
    record = copy.deepcopy(RECORD)
    del record["benchmarks"]["sampling"], record["benchmarks"]["sparse-attention-glm"]["result"]
    record["benchmarks"]["sparse-attention-glm"]["error"] = "exit status 1"
    for name in ("sampling", "sparse-attention", "kernels avx2"):
        assert readme_tables.with_tables(page(name), record) == (page(name), [])
    both, _ = readme_tables.with_tables(page("kernels avx2", "kernels avx512"), record)
    assert both.count("of today") == 1
    assert LINES["kernels"] in both.partition("kernels avx512")[2]


def test_the_pages_markers_name_tables() -> None:
    markers = marked_tables.names(PAGE)
    assert {readme_tables.parsed(marker)[0] for marker in markers} == set(readme_tables.TABLES)
    wanted = [benchmark for table in readme_tables.TABLES.values() for benchmark in table.benchmarks]
    assert sorted(wanted) == sorted(recorder.BENCHMARKS)
    for line in LINES.values():
        assert line in readme_tables.with_tables(PAGE, RECORD)[0]


@pytest.mark.parametrize("marker", ["speed", "kernels sse"])
def test_a_marker_of_no_table(marker: str) -> None:
    with pytest.raises(ValueError, match=f"no table '{marker}'"):
        readme_tables.with_tables(page(marker), RECORD)


@pytest.mark.parametrize("end", ["", f"{marked_tables.END}\n{marked_tables.END}\n"])
def test_a_table_without_its_end(end: str) -> None:
    with pytest.raises(ValueError, match="'ranks' needs one end"):
        marked_tables.names(f"{page('kernels')}<!-- begin of the table: ranks -->\n{end}{page('serve')}")


def test_a_smoke_run_leaves_the_page() -> None:
    with pytest.raises(SystemExit, match="smoke run"):
        readme_tables.write({**RECORD, "quick": True})


def test_the_machine_is_described() -> None:
    found = json.loads(machine.as_json({"rows": [1]}))
    assert found["rows"] == [1]
    about = found["machine"]
    assert about["cores"] >= 1
    assert about["memory_bytes"] > 1 << 28
    assert about["versions"]["torch"]
    done = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert done.returncode or done.stdout.startswith(about["commit"].rstrip("+"))


def test_a_ratio_is_of_a_round() -> None:
    """The median of ratios is not the ratio of medians."""
    found = rounds.summary(
        [{"a": 1, "b": 1, "ratio": 1}, {"a": 10, "b": 2, "ratio": 5}, {"a": 3, "b": 9, "ratio": 1 / 3}]
    )
    assert found["medians"] == {"a": 3, "b": 2, "ratio": 1}
    assert rounds.with_spread(found, "ratio") == "1.00 (0.33 to 5.00)"


def test_a_benchmark_that_fails_leaves_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit('no such model')")
    (tmp_path / "silent.py").write_text("print('table')")
    (tmp_path / "sound.py").write_text("print('{}')")
    monkeypatch.setattr(recorder, "HERE", tmp_path)
    monkeypatch.setattr(recorder, "read_bandwidth", lambda threads: 1.0)
    found = {name: recorder.run([f"{name}.py"], 1, 300) for name in ("broken", "silent", "sound")}
    assert found["broken"]["error"] == "exit status 1: no such model"
    assert found["silent"]["error"].startswith("its --json is none")
    assert found["sound"]["result"] == {}
    assert found["sound"]["cpu_s"] > 0


def running(stat: Path) -> bool:
    """Whether the process of this /proc/PID/stat lives and is no zombie."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_benchmark_that_takes_too_long_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    monkeypatch.setattr(recorder, "HERE", tmp_path)
    monkeypatch.setattr(recorder, "LEAST_SECONDS", 0)
    monkeypatch.setattr(recorder, "read_bandwidth", lambda threads: 1.0)
    found = recorder.run(["endless.py", str(tmp_path / "child")], 1, 3)
    assert found["error"] == "stopped at its limit of 3 s; it last said: half done"
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    deadline = time.monotonic() + 60  # The signal was sent; a busy system delivers it late.
    while running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(child)
    monkeypatch.setattr(recorder, "LEAST_SECONDS", 15)
    assert recorder.run(["endless.py"], 1, 3)["error"] == "no time was left for it: give --minutes"


def test_a_table_whose_figures_are_missing_is_named_and_stays() -> None:
    record = copy.deepcopy(RECORD)
    del record["benchmarks"]["ranks"]["result"]["settings"]
    both, failed = readme_tables.with_tables(page("ranks", "sampling"), record)
    assert failed == ["table ranks: KeyError('settings')"]
    assert both.count("of today") == 1
