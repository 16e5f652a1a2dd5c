"""`npuq doctor --bench`: times by a clock of our own, bytes by hand, and the command on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from npuq.cli.doctor import command
from npuq.convert import convert_checkpoint
from npuq.errors import GenerationError
from npuq.models.config import ModelConfig
from npuq.runtime.backend import make_ops
from npuq.runtime.diagnostics import tune as tuning
from npuq.runtime.diagnostics.bench import decode, timing
from npuq.runtime.diagnostics.bench.synthetic import DEEPSEEK_V3_LAYERS, random_model
from npuq.runtime.diagnostics.bench.traffic import operator_bytes, step_bytes
from npuq.runtime.engine import Engine
from npuq.runtime.engine_config import EngineConfig
from npuq.runtime.ops.ascend.tuning.grouped_matmul import Tuning
from npuq.runtime.step import Chunk, RopeRows

EXAMPLE = Path(__file__).parents[3] / "examples" / "tiny-deepseek-v3-fp8"
CONFIG = {**json.loads((EXAMPLE / "config.json").read_text()), "num_nextn_predict_layers": 0}


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test says so."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now.seconds)
    return now


def test_an_operators_time_is_without_that_of_those_it_calls(clock):
    class Part:
        def outer(self, x):
            clock.seconds += 1e-3
            self.inner(x)
            return self.inner(x)

        def inner(self, x):
            clock.seconds += 4e-3
            return x + 1

        def composed(self, x):
            return self.outer(self.inner(x))

    part = Part()
    timer = timing.OperatorTimer(SimpleNamespace(norms=part, device=torch.device("cpu")))
    with timer.watching():
        for _ in range(5):
            part.composed(torch.zeros(2, 3))
    times = {each.operator: each for each in timer.times()}
    assert times["inner"].calls == 15 and times["inner"].seconds == pytest.approx(4e-3)
    assert times["outer"].calls == 5 and times["outer"].seconds == pytest.approx(1e-3)
    assert "composed" not in times  # it has no time of its own
    assert list(times) == ["inner", "outer"] and times["inner"].step_seconds == pytest.approx(60e-3)
    assert times["inner"].bytes == 2 * 6 * 4 and times["inner"].shapes == "2×3 → 2×3"
    assert part.outer.__func__ is Part.outer  # nothing stays wrapped


def test_short_calls_are_repeated_until_the_clock_can_tell(clock):
    calls = []

    def run():
        calls.append(1)
        clock.seconds += 1e-4

    assert timing.seconds_of(run, torch.device("cpu"), 2e-3, 50) == pytest.approx(1e-4)
    assert len(calls) == 1 + 20


def engine_of(backend: str, sequences: int) -> Engine:
    model, tables = random_model(ModelConfig.from_dict(CONFIG), make_ops(backend))
    sizes = EngineConfig(kv_cache_bytes=64 << 20, max_num_seqs=sequences)
    return Engine(model, RopeRows.of(tables, model.ops), frozenset(), sizes)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bytes_of_a_step(backend):
    """Shapes of the example's config, by hand."""
    sequences, context = 3, 200
    engine = engine_of(backend, sequences)
    chunks = [Chunk([5], context - 1, range(2 * i, 2 * i + 2)) for i in range(sequences)]
    step, _ = engine.builder.build(chunks)
    hidden, heads, lora, latent, rope, head = 256, 4, 256, 512, 64, 128
    width = engine.model.ops.dtype.itemsize

    def w8a8(outputs: int, inputs: int) -> int:
        return outputs * inputs + 4 * outputs

    attention = w8a8(lora, hidden) + w8a8(heads * (head + rope), lora) + w8a8(latent + rope, hidden)
    attention += w8a8(hidden, heads * head) + 2 * 2 * heads * head * latent + width * (lora + latent)  # kv_b is bf16
    shared = 3 * 128 * hidden + 4 * (2 * 128 + hidden)
    dense = 3 * 640 * hidden + 4 * (2 * 640 + hidden)
    expert = 3 * 128 * hidden // 2 + 4 * (2 * 128 + hidden)
    reached = 1 - (1 - 4 / 16) ** sequences
    moe = shared + 16 * expert * reached + 16 * (2 * hidden + 4)
    norms = 2 * width * hidden
    cache = sequences * context * (latent + rope) * width
    top = 2 * 4096 * hidden + sequences * 2 * hidden + width * hidden
    expected = 4 * (attention + norms + cache) + dense + 3 * moe + top
    found = step_bytes(engine.model.weights, engine.cache, step, None)
    # Backends keep some scales and routers in other widths.
    assert found == pytest.approx(expected, rel=0.01 if backend == "cpu" else 0.5)


GROUPED = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bytes_of_grouped_query_attention(backend, monkeypatch):
    """Without the rest of a step, whose bytes do not depend on the context; and every operator is timed."""
    # Whether an operator that calls others is listed would depend on this machine's times.
    monkeypatch.setattr(timing, "OWN_SHARE", 0)
    short, long = (decode.bench_random(backend, None, 3, context, GROUPED) for context in (100, 300))
    width = make_ops(backend).dtype.itemsize
    assert long.bytes - short.bytes == 2 * 3 * 200 * 2 * (2 * 32) * width
    (attention,) = (each for each in long.operators if each.operator == "decode")
    q, kv, hidden = 4 * 32, 2 * 32, 64
    weights = (q + 2 * kv) * (hidden + 4) + hidden * (q + 4) + 2 * 32 * width
    cached = (3 * 300 + 3) * 2 * kv * width
    assert attention.bytes == pytest.approx(weights + cached, rel=0.02)


def test_only_experts_with_rows_count():
    ops = make_ops("reference")
    model, _ = random_model(ModelConfig.from_dict(CONFIG), ops)
    experts = model.weights.layers[1].moe.gate_up
    rows, out = torch.zeros(4, 256), torch.zeros(4, 256)
    one, all_of_them = (
        operator_bytes("grouped_matmul", [rows, experts, torch.tensor(groups)], out)
        for groups in ([4] + [0] * 15, [1] * 16)
    )
    moved = rows.nbytes + out.nbytes + 16 * 8
    assert 15.9 < (all_of_them - moved) / (one - moved) < 16.1


def test_gate_and_up_of_the_experts_count_alone():
    model, _ = random_model(ModelConfig.from_dict(CONFIG), make_ops("reference"))
    moe = model.weights.layers[1].moe
    rows, out = torch.zeros(4, 256), torch.zeros(4, 128)
    groups = torch.tensor([4] + [0] * 15)
    inner = operator_bytes("experts_inner", [rows, groups, moe], out)
    product = operator_bytes("grouped_matmul", [rows, moe.gate_up, groups], out)
    assert inner == product


def test_sequences_may_be_more_than_the_vocabulary_has_room_for():
    bench = decode.bench_random("reference", None, 12, 2, {**CONFIG, "vocab_size": 64})
    assert bench.sequences == 12


@pytest.mark.parametrize("replays", [0, 1, None])
def test_a_step_that_is_too_large_and_a_replay_that_fails_have_no_time(replays):
    """replays: that work before one fails; None: the step is larger than any graph, whose use goes on."""
    engine = engine_of("reference", 2)

    class Graphs:
        active, ran = True, 0

        def run(self, chunks):
            self.ran += 1
            if replays is None or self.ran > replays:
                self.active = replays is None
                return None
            return torch.zeros(2, 3)

    engine.graphs = Graphs()
    assert decode.measure(engine, "random", 2, 40).graph_seconds is None


def test_tuning_reads_no_earlier_choices(monkeypatch, artifact):
    """Also from a file that is refused: measuring again is to replace it."""
    made = []

    def make(device, **options):
        made.append((device, options))
        return make_ops("reference")

    monkeypatch.setattr(tuning, "AscendOps", make)
    monkeypatch.setattr("npuq.runtime.diagnostics.doctor.examine", lambda *_: SimpleNamespace(ready=True))
    monkeypatch.setattr("npuq.cli.doctor._print", lambda report: None)
    done = CliRunner().invoke(command, ["--tune", str(artifact)])
    assert "only the ascend backend" in str(done.exception) and made == [("npu:0", {"tuning": Tuning()})]


def test_a_random_model_is_measured():
    bench = decode.bench_random("reference", None, 2, 40, CONFIG)
    assert (bench.backend, bench.sequences, bench.context, bench.emulated) == ("reference", 2, 40, False)
    assert bench.graph_seconds is None and bench.eager_seconds > 0
    # Operators that call no others: whether one that does is listed depends on this machine's times.
    calls = {each.operator: each.calls for each in bench.operators}
    assert calls["fused_infer_attention_paged"] == 4 and calls["moe_gating_top_k"] == 3
    assert json.loads(json.dumps(bench.as_json()))["model"] == "4 layers of deepseek_v3, random weights"


def test_the_default_model_has_the_widths_of_deepseek_v3():
    config = ModelConfig.from_dict(DEEPSEEK_V3_LAYERS)
    assert (config.hidden_size, config.attention.heads, config.num_hidden_layers) == (7168, 128, 2)
    assert [config.moe_at(layer) is not None for layer in range(2)] == [False, True]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("bench") / "artifact"
    convert_checkpoint(EXAMPLE, output, method="minmax", workers=1)
    return output


def test_the_command_measures_a_model(artifact, monkeypatch):
    monkeypatch.setattr(decode, "STEP_SECONDS", 0.01)
    arguments = ["--bench", str(artifact), "--sequences", "2", "--context", "40"]
    text = CliRunner().invoke(command, arguments)
    assert text.exit_code == 0, text.output
    assert f"Decode step of {artifact}: 2 sequences of 40 tokens, cpu on cpu." in text.output
    assert "step, eager" in text.output and "tokens/s" in text.output and "EMULATED" not in text.output
    done = CliRunner().invoke(command, [*arguments, "--json"])
    bench = json.loads(done.output)["bench"]
    assert bench["sequences"] == 2 and bench["graph_seconds"] is None and bench["eager_seconds"] > 0
    assert {"operator", "shapes", "calls", "seconds", "bytes"} == set(bench["operators"][0])


def test_a_context_beyond_the_models_is_refused(artifact):
    with pytest.raises(GenerationError, match="a context of 5000 tokens; the model's is 4096"):
        decode.bench_model(artifact, "cpu", None, 1, 5000)


def test_tuning_needs_a_model_and_an_npu(artifact):
    assert "give MODEL" in CliRunner().invoke(command, ["--tune"]).output
    done = CliRunner().invoke(command, ["--tune", str(artifact)])
    assert done.exit_code == 1 and "--tune measures an NPU, and none can be used here" in str(done.exception)
