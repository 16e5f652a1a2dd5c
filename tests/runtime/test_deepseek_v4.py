"""DeepSeek-V4 on the reference backend against transformers' DeepseekV4ForCausalLM: same weights, float32."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npuq.runtime
from npuq import convert_checkpoint
from npuq.errors import BackendError, CheckpointError
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.schemes import Scheme, dequantize
from npuq.formats.sources.model_config import read_model_config
from npuq.formats.sources.opening import open_weights
from npuq.models.config import ModelConfig
from npuq.runtime import EngineConfig, LanguageModel, SamplingParams
from npuq.runtime.attention.kinds import attention_of
from npuq.runtime.memory.stored import stored_model
from npuq.runtime.memory.weights import CpuMemory, weight_bytes
from npuq.runtime.ops.reference import ReferenceOps
from npuq.runtime.ranks.layout import Layout
from npuq.runtime.step import Chunk, RopeRows
from npuq.runtime.store import open_store
from npuq.runtime.weights import load_rope_tables, load_weights

sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))

from calibrated import add_tokenizer, text
from deepseek_v4 import CONFIG, VOCABULARY, golden_model, release_names, release_tensors, write_model
from held import held_bytes
from packed_v4 import write_release, write_values
from safetensors.torch import save_file

TOLERANCE = 1e-4
# Many entries of 4 tokens, five of 24; the window reaches over a block of 16 and begins in another.
TOKENS = torch.randint(2, VOCABULARY, (130,), generator=torch.Generator().manual_seed(3)).tolist()
OTHERS = [TOKENS[40:75], TOKENS[:1], TOKENS[20:29], TOKENS[90:]]
SMALL = EngineConfig(block_size=16, max_num_seqs=4, max_num_batched_tokens=24, kv_cache_bytes=8 << 20)

Pair = tuple[Any, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp("v4") / "source"
    golden = golden_model(CONFIG)
    write_model(directory, golden, CONFIG)
    add_tokenizer(directory, VOCABULARY)
    return golden, directory


@pytest.fixture(scope="module")
def expected(pair: Pair) -> Tensor:
    return golden_logits(pair[0], TOKENS)


def golden_logits(golden: Any, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = golden(torch.tensor([tokens])).logits[0]
        return logits


def error(ours: Tensor, golden: Tensor) -> float:
    return float((ours.float() - golden).abs().max())


def load(directory: Path, engine: EngineConfig | None = None) -> LanguageModel:
    return npuq.runtime.load(directory, "reference", engine=engine)


def by_chunks(model: LanguageModel, tokens: list[int], starts: list[int]) -> Tensor:
    """Logits of all tokens, from chunks that begin at `starts`, through the cache."""
    engine = model.engine
    blocks = engine.blocks.allocate(engine.blocks.blocks_for(len(tokens)))
    assert blocks is not None
    rows = [
        engine._run([Chunk(tokens[start:end], start, blocks, all_rows=True)])[0]
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True)
    ]
    engine.blocks.release(blocks)
    return torch.cat(rows)


def greedy(model: LanguageModel, prompts: list[list[int]], new: int) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_new_tokens=new, ignore_eos=True)
    sequences = [model.engine.add(prompt, params) for prompt in prompts]
    while any(sequence.finish_reason is None for sequence in sequences):
        model.engine.step()
    return [sequence.tokens[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]


def test_whole_sequences(pair: Pair, expected: Tensor) -> None:
    golden, directory = pair
    sequences = [TOKENS, *OTHERS]
    for tokens, ours in zip(sequences, load(directory).logits(sequences), strict=True):
        assert error(ours, expected if tokens is TOKENS else golden_logits(golden, tokens)) < TOLERANCE


@pytest.mark.parametrize("block_size", [16, 48, 256])
@pytest.mark.parametrize(
    "starts",
    [[0, 24, 48, 72, 96, 120], [0, 5, 7, 8, 9, 17, 60], [0, 88, *range(89, 130)]],
    ids=["chunks", "uneven chunks", "a prompt, then one by one"],
)
def test_through_the_cache(pair: Pair, expected: Tensor, starts: list[int], block_size: int) -> None:
    # Blocks that entries and window fit into, and do not.
    model = load(pair[1], replace(SMALL, block_size=block_size))
    assert error(by_chunks(model, TOKENS, starts), expected) < TOLERANCE


def test_batches_prefix_cache_and_preemption(pair: Pair) -> None:
    golden, directory = pair
    prompts = [TOKENS[:50], *OTHERS[:3]]
    alone = [greedy(load(directory), [prompt], 24)[0] for prompt in prompts]
    for prompt, tokens in zip(prompts, alone, strict=True):
        rows = golden_logits(golden, prompt + tokens)
        assert rows[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
    model = load(directory, SMALL)
    assert greedy(model, prompts, 24) == alone
    assert greedy(model, prompts, 24) == alone  # the second time from shared blocks
    assert model.engine.blocks.num_known > 0
    block = model.engine.cache_bytes // model.engine.blocks.num_blocks
    model = load(directory, replace(SMALL, kv_cache_bytes=9 * block))
    assert greedy(model, prompts, 24) == alone
    assert model.engine.scheduler.num_preempted > 0


def test_a_sequence_begins_in_the_blocks_of_another(pair: Pair) -> None:
    golden, directory = pair
    model = load(directory, SMALL)
    greedy(model, [TOKENS[:70]], 2)
    prompt = TOKENS[:64] + TOKENS[100:]
    sequence = model.engine.add(prompt, SamplingParams(temperature=0, max_new_tokens=3, ignore_eos=True))
    while sequence.finish_reason is None:
        model.engine.step()
    assert sequence.num_reused == 64
    rows = golden_logits(golden, sequence.tokens)
    assert rows[len(prompt) - 1 : -1].argmax(-1).tolist() == sequence.tokens[len(prompt) :]


def test_the_cache_keeps_few_rows(pair: Pair) -> None:
    attention = load(pair[1], SMALL).engine.model.attention
    rows = [
        {pool.name: pool.rows(64) for pool in load(pair[1], SMALL).engine.model.ops.caches.stored(pools)}
        for pools in (attention.pools(layer) for layer in range(3))
    ]
    assert rows == [
        {"key": 12},
        {"key": 12, "tokens": 8, "entry": 16, "index_tokens": 8, "index_entry": 16},
        {"key": 12, "tokens": 24, "entry": 3},
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_follow_float32(pair: Pair, expected: Tensor, dtype: torch.dtype) -> None:
    model = npuq.runtime.load(pair[1], "reference", dtype, engine=SMALL)
    ours = by_chunks(model, TOKENS[:60], [0, 24, 48, 49])
    assert ours.dtype == dtype
    assert float((ours.float() - expected[:60]).norm() / expected[:60].norm()) < 0.3


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_other_backends_name_what_runs_it(pair: Pair, backend: str) -> None:
    with pytest.raises(BackendError, match=r"reference backend alone.*vLLM-Ascend or SGLang"):
        npuq.runtime.load(pair[1], backend)


def test_a_table_of_experts_that_are_not_there(pair: Pair, tmp_path: Path) -> None:
    golden, _ = pair
    write_model(tmp_path, golden, CONFIG)
    tensors = release_tensors(golden, torch.float32)
    tensors["layers.1.ffn.gate.tid2eid"][7, 1] = 8
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.gate\.tid2eid.* has the number 8, and must have 0 to"):
        load(tmp_path)


def fake_quant(x: Tensor) -> Tensor:
    """What an int8 activation with one scale a token stands for."""
    scale = x.abs().amax(-1, keepdim=True).double() / 127
    return (torch.round(x.double() / scale) * scale).float()


def simulated(golden: Any, artifact: Path) -> Any:
    """The golden model with the artifact's weights dequantized, and activations rounded before quantized linears."""
    model, schemes = copy.deepcopy(golden), json.loads((artifact / "quant_model_description.json").read_text())

    with Checkpoint.open(artifact) as checkpoint, torch.no_grad():

        def weight(name: str) -> Tensor:
            scheme = Scheme(schemes[name])
            if scheme is Scheme.FLOAT:
                return checkpoint.read(name).float()
            stored = {part: checkpoint.read(name.removesuffix("weight") + part) for part in ("weight", "weight_scale")}
            return dequantize(stored, scheme)

        for name, parameter in model.named_parameters():
            parts = [weight(each) for each in release_names(name, parameter.shape[0])]
            parameter.copy_(torch.cat(parts).view(parameter.shape))
        for name, module in model.named_modules():
            if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, torch.nn.Parameter):
                module.forward = _experts_forward(module)
            elif isinstance(module, torch.nn.Linear) and _scheme(schemes, name) is Scheme.W8A8:
                module.register_forward_pre_hook(lambda _, inputs: (fake_quant(inputs[0]),))
    return model


def _scheme(schemes: dict[str, str], module: str) -> Scheme:
    return Scheme(schemes[release_names(f"{module}.weight")[0]])


def _experts_forward(module: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    limit = CONFIG["swiglu_limit"]

    def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for token in range(hidden.shape[0]):
            for expert, factor in zip(ids[token].tolist(), weights[token], strict=True):
                gate, up = (module.gate_up_proj[expert] @ fake_quant(hidden[token])).chunk(2)
                inner = torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
                out[token] += factor * (module.down_proj[expert] @ fake_quant(inner))
        return out

    return forward


@pytest.fixture(scope="module")
def artifact(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("v4-w4a8") / "artifact"
    convert_checkpoint(pair[1], output, method="minmax")
    return output


def test_the_quantized_pass_is_that_of_the_stored_weights(pair: Pair, artifact: Path, expected: Tensor) -> None:
    tokens = TOKENS[:60]
    stored = golden_logits(simulated(pair[0], artifact), tokens)
    model = load(artifact, SMALL)
    for ours in (next(iter(model.logits([tokens]))), by_chunks(model, tokens, [0, 24, 48, 49])):
        errors, effect = ((rows - stored).norm(dim=1) / stored.norm(dim=1) for rows in (ours, expected[: len(tokens)]))
        # A rounding that falls the other way moves a code by one, in its token and all later ones: far less than what
        # quantization does. Many tokens come before the first.
        assert float(errors.sort().values[9]) < 1e-5
        assert float(errors.median()) < 0.1 * float(effect.median())


def test_a_release_is_computed_as_its_values(tmp_path: Path) -> None:
    write_values(tmp_path / "values", write_release(tmp_path / "release"))
    ours, golden = (next(iter(load(tmp_path / name).logits([TOKENS[:50]]))) for name in ("release", "values"))
    assert torch.equal(ours, golden)


@pytest.mark.parametrize("name", ["source", "artifact"])
def test_the_memory_plan_is_what_is_held(pair: Pair, artifact: Path, name: str) -> None:
    ops = ReferenceOps()
    with Checkpoint.open(pair[1] if name == "source" else artifact) as checkpoint:
        config = read_model_config(checkpoint)
        model = stored_model(config, open_weights(checkpoint).weights)
        rope = RopeRows.of(load_rope_tables(checkpoint, config), ops)
        weights = load_weights(open_store(checkpoint, ops.dtype), config, ops, attention_of(config, 1.0))
        held = held_bytes((weights, rope), checkpoint.files, unread=("scale_bias", "frequencies"))
    planned = weight_bytes(model, Layout().owned(config, 0), CpuMemory()).values()
    assert held == (sum(each.mapped for each in planned), sum(each.copied for each in planned))


def test_commands(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    """As a user: a release with FP8, FP4 and an MTP layer, converted, evaluated beside its source, and run."""
    words, source, artifact = tmp_path / "text.txt", tmp_path / "release", tmp_path / "artifact"
    words.write_text(text(150, vocabulary=VOCABULARY))
    write_release(source)
    add_tokenizer(source, VOCABULARY)
    assert run("convert", source, artifact, "--quiet")[0] == 0
    judged = ("evaluate", artifact, "--text", words, "--source", source, "--context", 64, "--json", "--quiet")
    code, out, err = run(*judged, "--layers", "--save", "--backend", "reference")
    assert (code, err) == (0, "")
    values = json.loads(out)
    assert values["tokens"] == 150 and 0 < values["kl_divergence"] < 1
    errors = [layer["relative_error"] for layer in values["layers"]]
    assert len(errors) == 4 and all(0 < each < 0.5 for each in errors)
    code, out, _ = run("generate", artifact, "--prompt", "w3 w4 w5", "--max-new-tokens", 4, "--backend", "reference")
    assert code == 0 and out.strip()
    for refused, why in (
        (("generate", artifact, "--prompt", "w3"), "vLLM-Ascend or SGLang"),
        (
            ("generate", artifact, "--prompt", "w3", "--backend", "reference", "--kv-cache-dtype", "int8"),
            "int8 KV cache",
        ),
        (("doctor", "--plan", artifact), "deepseek_v4 has no memory plan"),
    ):
        code, out, err = run(*refused)
        assert code == 1 and out == "" and err.count("\n") == 1 and why in err


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", ["yarn"], 1])
def test_other_rotary_scaling_is_refused_by_name(kind: object) -> None:
    scaling = {**CONFIG["rope_scaling"], "type": kind}
    with pytest.raises(CheckpointError, match=r"config\.json: rope type .*yarn, or default"):
        ModelConfig.from_dict({**CONFIG, "rope_scaling": scaling})
