"""Calibrated conversion on small models: interrupted, with any number of workers, with experts nobody chose."""

from __future__ import annotations

import json
import random
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from calibrated import CHAIN, LENGTH, STATIC, add_tokenizer, convert

from npuq.convert import CalibrationText, convert_checkpoint
from npuq.convert.calibrate.auto import TimeBudget
from npuq.convert.calibrate.context import Layer
from npuq.convert.calibrate.layer_report import Trials
from npuq.convert.calibrate.layers.linears import JobResult, Linears
from npuq.convert.calibrate.layers.smooth import norm_quotient, rounded
from npuq.convert.calibrate.memory import calibrated_budget, expert_bytes
from npuq.convert.plan.memory import Budget
from npuq.convert.plan.prepare import prepare
from npuq.errors import CalibrationError, CheckpointError, ConversionError, RecipeError
from npuq.formats.schemes import Scheme, dequantize, quantize_rows
from npuq.models.config import ModelConfig
from npuq.parallel.pool import Pool
from npuq.quant.arithmetic import TorchArithmetic
from npuq.quant.scales import Method
from npuq.quant.weight_error import ErrorSums
from npuq.verification import verify


@pytest.fixture(scope="module")
def source(write, tmp_path_factory) -> Path:
    directory = write(tmp_path_factory.mktemp("calibrated") / "source", fp8_block=16)
    add_tokenizer(directory)
    return directory


def manifest_of(output: Path) -> dict:
    return json.loads((output / "npuq" / "manifest.json").read_text())


@pytest.mark.parametrize("family", ["v3", "kimi", "v2lite", "glm"])
@pytest.mark.parametrize("method", ["gptq", "smooth+mse", CHAIN])
def test_every_family_and_chain_gives_a_sound_artifact(family, method, write, texts, tmp_path):
    directory = write(tmp_path / "source", family=family)
    add_tokenizer(directory)
    convert(directory, tmp_path / "out", texts, method=method)
    verdict = verify(tmp_path / "out", directory)
    assert verdict.problems == ()
    # Smoothing folds factors into norms, which verify notes; SGLang's draft of a GLM is a note of its own.
    notes = [note for note in verdict.notes if "MTP draft" not in note]
    assert bool(notes) is ("smooth" in method)
    manifest = manifest_of(tmp_path / "out")
    layers = manifest["calibration"]["layers"]
    assert list(layers) == ["0", "1", "2"] and layers["0"]["expert_tokens"] == []
    assert sum(layers["1"]["expert_tokens"]) == 8 * LENGTH * 2  # two experts a token
    assert 0 < layers["2"]["output_error"] < 1
    assert manifest["transforms"] == method.split("+")[:-1]
    assert not (tmp_path / "out" / "npuq" / "calibration").exists()


def test_workers_and_memory_do_not_change_a_byte(source, texts, tmp_path, tree):
    for name, options in {"one": {"workers": 1}, "three": {"workers": 3, "max_memory": 500_000_000}}.items():
        convert(source, tmp_path / name, texts, **options)
    assert tree(tmp_path / "one") == tree(tmp_path / "three")


@pytest.mark.parametrize("seed", range(4))
def test_killed_anywhere_it_continues_to_the_same_bytes(seed, rig, source, texts, tmp_path, tree, undisturbed):
    expected, calls = undisturbed
    draw = random.Random(seed)
    options = {"method": CHAIN, "calibration": [str(texts), 8, LENGTH], "workers": 1}
    for _ in range(2):
        answer = rig(source, tmp_path / "out", options=options, kill_at=draw.randint(1, calls))
        if not answer["killed"]:
            break
    answer = rig(source, tmp_path / "out", options=options | {"workers": 2})
    assert answer["summary"]["status"] in ("converted", "finished")
    assert tree(tmp_path / "out") == expected


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_a_full_disk_and_a_signal_are_one_line_and_lose_nothing(share, rig, source, texts, tmp_path, tree, undisturbed):
    expected, calls = undisturbed
    options = {"method": CHAIN, "calibration": [str(texts), 8, LENGTH], "workers": 2}
    point = int(share * calls)
    full = rig(source, tmp_path / "full", options=options, fail_at=point)
    assert full["kind"] == "ConversionError" and full["exit_code"] == 1 and "\n" not in full["error"]
    assert "No space left on device" in full["error"] and "run the same command" in full["error"]
    stopped = rig(source, tmp_path / "stopped", options=options, signal_at=[point, int(signal.SIGINT)])
    assert stopped["kind"] == "ConversionInterruptedError" and stopped["exit_code"] == 130
    for name in ("full", "stopped"):
        assert rig(source, tmp_path / name, options=options)["summary"]["status"] == "converted"
        assert tree(tmp_path / name) == expected


def test_no_room_for_hidden_states(rig, source, texts, tmp_path):
    """The kernel itself refuses: every shard fits its limit, the hidden states do not."""
    options = {"method": CHAIN, "calibration": [str(texts), 128, LENGTH], "max_shard_size": 100_000}
    answer = rig(source, tmp_path / "out", options=options, file_limit=300_000)
    assert answer["kind"] == "ConversionError" and "\n" not in answer["error"]
    assert "npuq/calibration" in answer["error"] and "File too large" in answer["error"]


@pytest.fixture(scope="module")
def undisturbed(rig, source, texts, tmp_path_factory, tree):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    options = {"method": CHAIN, "calibration": [str(texts), 8, LENGTH], "workers": 1}
    answer = rig(source, output, options=options)
    assert answer["summary"]["status"] == "converted"
    return tree(output), answer["calls"]


def test_a_continued_walk_does_not_repeat_layers(rig, source, texts, tmp_path):
    """Killed when the third layer's state is published, only what follows is left."""
    options = {"method": CHAIN, "calibration": [str(texts), 8, LENGTH], "workers": 1}
    # The journal itself, then a file of streams and a state for each of four points.
    assert rig(source, tmp_path / "out", options=options, kill_at=7, calls=["replace"])["killed"]
    state = json.loads((tmp_path / "out" / "npuq" / "calibration" / "state.json").read_text())
    summary = rig(source, tmp_path / "out", options=options)["summary"]
    assert state["layer"] >= 1 and summary["jobs_resumed"] > 10


def test_a_lost_shard_or_state_is_made_again(rig, source, texts, tmp_path, tree, undisturbed):
    options = {"method": CHAIN, "calibration": [str(texts), 8, LENGTH], "workers": 1}
    output = tmp_path / "out"
    assert rig(source, output, options=options, kill_at=8, calls=["replace"])["killed"]
    for path in (output / "npuq" / "calibration").glob("streams-*.bin"):
        path.write_bytes(b"torn")
    assert rig(source, output, options=options)["summary"]["status"] == "converted"
    assert tree(output) == undisturbed[0]


def test_other_arguments_are_refused(rig, source, texts, tmp_path):
    options = {"method": CHAIN, "calibration": [str(texts), 8, LENGTH]}
    assert rig(source, tmp_path / "out", options=options, kill_at=8, calls=["replace"])["killed"]
    changed = {"method": CHAIN, "calibration": [str(texts), 9, LENGTH]}
    answer = rig(source, tmp_path / "out", options=changed)
    assert answer["kind"] == "ConversionError" and "calibration" in answer["error"]


def test_the_same_tokens_in_samples_of_another_length_are_other_samples(source, texts):
    prepared = prepare(source, "w4a8", "gptq", 10**9, CalibrationText(str(texts), 8, LENGTH))
    calibration = prepared.calibration
    halves = replace(calibration, tokens=calibration.tokens.view(16, LENGTH // 2))
    other = replace(prepared, calibration=halves).identity
    prepared.checkpoint.close()
    assert [key for key, value in prepared.identity.items() if other[key] != value] == ["calibration"]


def test_experts_that_nobody_chose_are_data_free_and_listed(write, texts, tmp_path):
    def starve(tensors):
        bias = tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
        bias[:] = torch.tensor([10.0, 10.0, -10.0, -10.0])

    directory = write(tmp_path / "source", edit=starve, config={"n_group": 1})
    add_tokenizer(directory)
    convert(directory, tmp_path / "out", texts, method="gptq")
    manifest = manifest_of(tmp_path / "out")
    layer = manifest["calibration"]["layers"]["1"]
    assert layer["expert_tokens"] == [128, 128, 0, 0]
    assert layer["fallbacks"] == {"2": "data-free", "3": "data-free"}
    convert_checkpoint(directory, tmp_path / "mse", method="mse")
    free, plain = (
        json.loads((tmp_path / name / "npuq" / "manifest.json").read_text())["linears"] for name in ("out", "mse")
    )
    starved, fed = (f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (2, 0))
    assert free[starved]["relative_error"] == plain[starved]["relative_error"]
    assert free[fed]["relative_error"] != plain[fed]["relative_error"]
    assert verify(tmp_path / "out", directory).ok


def test_rare_experts_are_blended(monkeypatch, source, texts, tmp_path):
    monkeypatch.setattr("npuq.convert.calibrate.layers.experts.ENOUGH", 70)
    convert(source, tmp_path / "out", texts, method="gptq")
    for layer in ("1", "2"):
        found = manifest_of(tmp_path / "out")["calibration"]["layers"][layer]
        expected = {str(e): "blended" for e, n in enumerate(found["expert_tokens"]) if 0 < n < 70}
        assert found["fallbacks"] == expected
    assert expected


def test_activations_that_are_no_numbers_name_the_layer(write, texts, tmp_path):
    def explode(tensors):
        tensors["model.layers.1.mlp.experts.0.up_proj.weight"][:] = 3e38
        tensors["model.layers.1.mlp.gate.e_score_correction_bias"][:] = torch.tensor([9.0, 9.0, 0.0, 0.0])

    directory = write(tmp_path / "source", edit=explode, config={"n_group": 1})
    add_tokenizer(directory)
    with pytest.raises(CalibrationError, match="layer 1: the feed-forward part"):
        convert(directory, tmp_path / "out", texts, method="gptq")


def test_auto_takes_the_better_trial(source, texts, tmp_path, tree):
    convert(source, tmp_path / "out", texts, method="auto")
    assert verify(tmp_path / "out", source).ok
    layers = manifest_of(tmp_path / "out")["calibration"]["layers"].values()
    for layer in layers:
        assert layer["smooth"] is (layer["trials"]["smooth"] <= layer["trials"]["not"])
        assert ("smoothing" in layer) is layer["smooth"]
    convert(source, tmp_path / "again", texts, method="auto", workers=1)
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


def test_auto_without_time_for_trials_smooths(source, texts, tmp_path):
    calibration = CalibrationText(texts, 8, LENGTH, time_budget=0.0)
    convert_checkpoint(source, tmp_path / "out", method="auto", calibration=calibration)
    convert(source, tmp_path / "chain", texts)
    ours, chain = (manifest_of(tmp_path / name)["calibration"]["layers"] for name in ("out", "chain"))
    for layer in ours.values():
        assert layer.pop("smooth") is True and "trials" not in layer
    assert ours == chain


def test_a_time_budget_counts_trials_apart_from_layers(source, texts, tmp_path, monkeypatch):
    clock, took = [0.0], []

    def trials(*_):
        clock[0] += 1000
        return Trials(0.0, 1.0)

    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr("npuq.convert.calibrate.walk.run_trials", trials)
    monkeypatch.setattr(TimeBudget, "layer_took", lambda self, seconds: took.append(seconds))
    convert(source, tmp_path / "out", texts, method="auto")
    assert took == [0.0, 0.0, 0.0]


def test_calibration_where_it_is_of_no_use(source, texts, tmp_path):
    with pytest.raises(RecipeError, match="--time-budget bounds the trials of --method auto"):
        convert(source, tmp_path / "out", texts, calibration=CalibrationText(texts, 8, LENGTH, time_budget=60.0))
    with pytest.raises(RecipeError, match="of no use to method mse"):
        convert(source, tmp_path / "out", texts, method="mse")
    with pytest.raises(RecipeError, match="of no use to method mse"):
        convert(source, tmp_path / "out", None, method="mse", calibration=CalibrationText(samples=8))
    with pytest.raises(RecipeError, match="did you mean 'rotate'"):
        convert(source, tmp_path / "out", texts, method="rotat+gptq")
    with pytest.raises(RecipeError, match="twice"):
        convert(source, tmp_path / "out", texts, method="smooth+smooth+gptq")


def test_static_scheme_gets_one_range_for_q_a_and_kv_a(source, texts, tmp_path):
    recipe = tmp_path / "static.yaml"
    recipe.write_text(STATIC)
    convert(source, tmp_path / "out", texts, recipe=recipe, method=None)
    assert verify(tmp_path / "out", source).ok
    manifest = manifest_of(tmp_path / "out")
    schemes = {
        name.split(".")[4]: linear["scheme"] for name, linear in manifest["linears"].items() if "layers.1.self" in name
    }
    assert schemes == {"q_a_proj": "W8A8", "kv_a_proj_with_mqa": "W8A8", "q_b_proj": "W8A8", "o_proj": "W8A8_DYNAMIC"}


def test_linears_of_two_schemes_share_inputs(write, texts, tmp_path):
    """Without q_lora, q_proj and kv_a are not one parameter: each may have its own scheme."""
    directory = write(tmp_path / "source", family="v2lite")
    add_tokenizer(directory)
    for name, quantized in (("one", "q_proj"), ("other", "kv_a_proj_with_mqa")):
        recipe = tmp_path / "static.yaml"
        recipe.write_text(
            f"method: gptq\nrules:\n- {{names: '*.self_attn.{quantized}.weight', scheme: W8A8_STATIC}}\n"
            "- {roles: routed_expert, scheme: W4A8}\n- scheme: W8A8\n"
        )
        convert(directory, tmp_path / name, texts, recipe=recipe, method=None)
        assert verify(tmp_path / name, directory).ok
        linears = manifest_of(tmp_path / name)["linears"]
        schemes = {key.split(".")[4]: linear["scheme"] for key, linear in linears.items() if "layers.0.self" in key}
        assert schemes[quantized] == "W8A8" and set(schemes.values()) == {"W8A8", "W8A8_DYNAMIC"}


def test_memory_is_that_of_one_expert_and_not_of_the_layer(write, texts, rig, tmp_path):
    """Sixteen times as many experts (75 MB of them in float32, 5 MB before) need no more memory."""
    peaks = []
    for experts in (4, 64):
        config = {"hidden_size": 256, "moe_intermediate_size": 384, "num_hidden_layers": 2, "n_routed_experts": experts}
        directory = write(tmp_path / f"source{experts}", config=config | {"num_nextn_predict_layers": 0})
        add_tokenizer(directory)
        options = {"method": CHAIN, "calibration": [str(texts), 8, LENGTH], "workers": 1}
        peaks.append(rig(directory, tmp_path / f"out{experts}", options=options)["memory"])
    # Between runs the same conversion differs by up to 30 MB: arenas of the allocator.
    assert peaks[1] < peaks[0] + 45_000_000


# DeepSeek-V3's own sizes.
V3 = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
}


def test_max_memory_takes_workers_away_and_then_refuses(source):
    config = ModelConfig.from_dict(json.loads((source / "config.json").read_text()) | V3)
    plenty = calibrated_budget(config, 65536, 512, Budget(16, 1 << 20, 10**9), None)
    assert plenty.workers == 16 and plenty.nbytes > 16 * expert_bytes(config, 65536) - 1
    # Its 256 experts would take 45 GB in float32.
    assert expert_bytes(config, 65536) < 4e9
    less = calibrated_budget(config, 65536, 512, Budget(16, 1 << 20, 10**9), 20 * 10**9)
    assert 1 <= less.workers < 16 and less.nbytes <= 20 * 10**9
    # Scores of a window of 8192 tokens for 128 heads: 34 GB, four times.
    assert calibrated_budget(config, 65536, 8192, Budget(1, 1 << 20, 10**9), None).nbytes > 4 * 34 * 10**9
    with pytest.raises(ConversionError, match="--max-memory 1000000000 is too small: calibrating"):
        calibrated_budget(config, 65536, 512, Budget(16, 1 << 20, 10**9), 10**9)


def test_a_gain_that_float16_cannot_divide_stays():
    """A norm's gain over a scale is stored in the model's dtype: what it flushes to zero would silence the channel."""
    job = SimpleNamespace(outputs=[SimpleNamespace(dtype="F16")])
    gain, scale = torch.tensor([1.0, 1e-4, 1e4, 0.0]), torch.tensor([4.0, 1e5, 1e-3, 2.0], dtype=torch.float64)
    smaller, factor = norm_quotient(Linears(None, TorchArithmetic()), job, gain, scale)
    assert smaller.tolist() == [0.25, pytest.approx(1e-4), 1e4, 0.0]
    torch.testing.assert_close(smaller * factor, gain)


@pytest.mark.parametrize("bits", ["W4A8", "W8A8"])
def test_rounding_some_rows_at_a_time_is_rounding_them_all(bits):
    weight = torch.randn(1100, 64, generator=torch.Generator().manual_seed(3))
    job = SimpleNamespace(source="w", method=Method.GPTQ, scheme=Scheme[bits], row_parallel=True, outputs=())
    plain = quantize_rows(weight, Scheme[bits], Method.MSE, row_parallel=True)
    inline = Pool(1).inline
    deployed, result = Linears(None, TorchArithmetic()).quantize(job, weight, None, None, None, inline)
    expected = dequantize(plain.tensors, Scheme[bits])
    assert torch.equal(deployed.weight, expected) and torch.equal(rounded(job, weight), expected)
    assert result.stats.squared_error == float(plain.squared_error.sum())


def test_a_float_tensor_that_cannot_be_stored_is_one_line():
    job = SimpleNamespace(source="w", shape=(2,), outputs=[SimpleNamespace(dtype="F16")])
    with pytest.raises(CheckpointError, match=r"^tensor 'w' outgrows float16 once it is rotated or smoothed; leave"):
        Linears(None, TorchArithmetic()).float(job, torch.tensor([1.0, 1e6]))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_smoothing_made_infinite_is_not_called_the_checkpoints_damage(bad):
    """Weights are found finite when they are read, before any factor."""
    job = SimpleNamespace(source="w", shape=(2,), outputs=[SimpleNamespace(dtype="F32")])
    with pytest.raises(CheckpointError, match=r"^tensor 'w' outgrows float32 once it is rotated or smoothed; leave"):
        Linears(None, TorchArithmetic()).float(job, torch.tensor([1.0, bad]))
    job = SimpleNamespace(source="w", method=Method.GPTQ, scheme=Scheme.W8A8, row_parallel=False, outputs=())
    weight = torch.ones(4, 64)
    weight[1, 2] = bad
    with pytest.raises(CheckpointError, match=r"^tensor 'w' outgrows float32 once it is rotated or smoothed; leave"):
        Linears(None, TorchArithmetic()).quantize(job, weight, None, None, None, Pool(1).inline)


def test_a_job_of_which_nobody_knows_what_it_read_is_not_journaled(source):
    """A line with an empty digest would end the journal."""
    job, written = SimpleNamespace(index=7), JobResult(ErrorSums(0.0, 1.0), b"d" * 16)
    config = ModelConfig.from_dict(json.loads((source / "config.json").read_text()))
    walk = SimpleNamespace(config=config, done=lambda job: None)
    trial = Layer(walk, 0)
    trial.finish(job, written)
    assert trial.entries == {}
    with pytest.raises(KeyError):
        Layer(walk, 0, {6: b"r" * 16}).finish(job, written)


def test_hidden_states_that_are_left_over_go_and_nothing_else_does(source, texts, tmp_path):
    convert(source, tmp_path / "out", texts)
    folder = tmp_path / "out" / "npuq" / "calibration"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    (folder / "mine.txt").write_text("mine")
    assert convert(source, tmp_path / "out", texts).status == "finished"
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
