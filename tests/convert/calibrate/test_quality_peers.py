"""benchmarks/quality/quality_peers.py with npuq's own methods; the other tools need environments of their own."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from npuq.runtime.text.tokenizer import Tokenizer

SCRIPT = Path(__file__).parents[3] / "benchmarks/quality/quality_peers.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quality_peers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_windows_are_of_the_text_apart_and_led_by_bos(script: ModuleType, example_fp8: Path, eval_text: Path) -> None:
    samples = script.calibration_samples(example_fp8, eval_text, 10, 64)
    tokenizer = Tokenizer(example_fp8)
    whole = tokenizer.encode(eval_text.read_text(encoding="utf-8"), special=False)
    assert [len(window) for window in samples] == [64] * 10 and {window[0] for window in samples} == {tokenizer.bos_id}
    starts = [len(whole) // 63 * index // 10 * 63 for index in range(10)]
    assert [window[1:] for window in samples] == [whole[start : start + 63] for start in starts]


def test_a_text_that_is_too_short_is_refused(script: ModuleType, example_fp8: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Call me Ishmael.")
    with pytest.raises(SystemExit, match=r"short.txt: has 0 samples of 64 tokens, fewer than --samples 2"):
        script.calibration_samples(example_fp8, tmp_path / "short.txt", 2, 64)


def test_a_row_holds_what_evaluation_and_the_system_say(
    script: ModuleType,
    example_fp8: Path,
    eval_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.txt").write_text(eval_text.read_text(encoding="utf-8")[:1500])
    places = ["--calibration", str(eval_text), "--text", str(tmp_path / "text.txt"), "--work", str(tmp_path / "work")]
    more = ["--samples", "2", "--rows", "npuq-mse", "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["quality_peers.py", str(example_fp8), *places, *more])
    script.main()
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert 0 < row["kl_divergence"] < 0.01 < 0.9 < row["top1_agreement"] < 1
    assert row["cost"]["seconds"] > 0 and 50e6 < row["cost"]["peak_bytes"] < 5e9
    assert f"| {row['kl_divergence']:.5f} |" in capsys.readouterr().out
    artifact = tmp_path / "work" / f"{row['model']}-npuq-mse"
    changed = artifact.stat().st_mtime_ns
    script.main()  # made once
    assert artifact.stat().st_mtime_ns == changed
