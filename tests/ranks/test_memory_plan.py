"""Memory plans: of published shapes, and of what is about to be loaded."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from published import GLM_52, KIMI_K2, RUN_ON_NPUS, V2_LITE, V3, V32, write_release
from tiny import FAMILIES, make_source

import npuq
from npuq.errors import BackendError, CheckpointError, NpuqWarning
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.safetensors import encode_header
from npuq.models.config import ModelConfig
from npuq.recipes.reading import load_recipe
from npuq.runtime import llm
from npuq.runtime.engine_config import EngineConfig
from npuq.runtime.memory import machine
from npuq.runtime.memory.plan import Planner
from npuq.runtime.memory.weights import CpuMemory, NpuMemory
from npuq.runtime.ranks.layout import Layout
from npuq.verification.memory_plan import plan_memory, read_stored, stored_by_recipe

GB = 1_000_000_000
W4A8 = load_recipe("w4a8")


def planner(config: dict[str, Any], memory: int = 64 * GB, recipe: str = "w4a8") -> Planner:
    model, _ = stored_by_recipe(ModelConfig.from_dict(config), load_recipe(recipe))
    return Planner(model, NpuMemory(), memory)


def expert_bytes(hidden: int, width: int, experts: int, layers: int) -> int:
    """Bytes of W4A8 experts on an NPU, counted by hand: two codes a byte; for each output eight bytes of scale, four of
    scale_bias."""
    return layers * experts * (3 * hidden * width // 2 + 12 * (2 * width + hidden))


def test_deepseek_v3_fits_a_server_with_a_cache_of_32k_tokens() -> None:
    """Against bytes counted by hand from the shapes: 58 layers of 256 experts, 61 of attention, 3 dense ones."""
    plan = planner(V3).choose(8)
    assert plan.layout == Layout(8, 8, 8)
    assert plan.weights["routed experts"].total == expert_bytes(7168, 2048, 32, 58)
    heads = 16
    whole = 7168 * (1536 + 576) + 4 * (1536 + 576) + 2 * (1536 + 512)  # q_a, kv_a, their scales and norms
    q_b, o = 1536 * heads * 192 + 4 * heads * 192, heads * 128 * 7168 + 4 * 7168
    assert plan.weights["attention"].total == 61 * (whole + q_b + o + 2 * 2 * heads * 256 * 512)
    dense, shared = (3 * 7168 * width + 4 * (2 * width + 7168) for width in (18432 // 8, 2048 // 8))
    assert plan.weights["MLPs"].total == 3 * dense + 58 * shared
    assert plan.weights["vocabulary"].total == 2 * 2 * 7168 * 129280 // 8
    assert plan.cache_token == 61 * 2 * (512 + 64)
    assert plan.cache_tokens > 4 * 32_768
    spent = plan.total_weights.total + plan.workspace.fixed + plan.cached(plan.cache_tokens)
    assert 0.9 * 64 * GB - 2 * plan.cache_token < spent <= 0.9 * 64 * GB


def test_what_a_server_of_8_does_not_hold() -> None:
    alone = planner(V3).rank(Layout(8, 8, 1))
    assert not alone.fits and alone.left < 0
    with pytest.raises(BackendError) as error:
        planner(KIMI_K2).choose(8)
    line = str(error.value)
    assert "with ep=8,tp=8 each rank needs 67.2 GB for weights and 623 MB for a step" in line
    assert "57.6 GB of 64 GB are usable; 16 such devices hold it" in line and "\n" not in line
    assert planner(KIMI_K2).choose(16).cache_tokens > 32_768


@pytest.mark.parametrize("name", RUN_ON_NPUS)
def test_every_release_fits_two_servers(name: str) -> None:
    plan = planner(RUN_ON_NPUS[name]).choose(16)
    assert plan.cache_tokens > 131_072
    assert plan.layout.ep == 16


@pytest.mark.parametrize(("config", "channels"), [(V2_LITE, 27 * 576), (V3, 61 * 576), (V32, 61 * (576 + 128))])
def test_the_cache_of_a_token(config: dict[str, Any], channels: int) -> None:
    assert planner(config).cache_token == 2 * channels


def test_layers_that_share_a_selection_have_no_index_keys_and_no_indexer() -> None:
    full = sum(word == "full" for word in GLM_52["indexer_types"])
    plan = planner(GLM_52)
    assert plan.cache_token == 2 * (78 * 576 + full * 128)
    listed = plan.rank(Layout()).weights["attention"].total
    every = planner({**GLM_52, "indexer_types": ["full"] * 78}).rank(Layout()).weights["attention"].total
    # wq_b in int8 with scales; wk, its norm and bias, and weights_proj in bf16 and float32
    indexer = 2048 * 4096 + 4 * 4096 + 2 * 6144 * (128 + 32) + 2 * 4 * 128
    assert every - listed == (78 - full) * indexer


def test_more_memory_never_leaves_fewer_tokens() -> None:
    plans, memories = planner(V3), range(40 * GB, 400 * GB, 7 * GB)
    tokens = [replace(plans, memory=memory).rank(Layout(8, 8, 8)).cache_tokens for memory in memories]
    assert tokens == sorted(tokens) and tokens[0] == 0 and tokens[-1] > 3_000_000


def test_ranks_that_divide_nothing_are_refused() -> None:
    with pytest.raises(BackendError, match="7 ranks divide neither the 256 routed experts nor the 128 attention heads"):
        planner(V3).choose(7)
    with pytest.raises(BackendError, match="no number of such devices holds it"):
        planner(V3, GB).choose(8)


@pytest.mark.parametrize("family", ["v2-lite", "kimi-k2", "glm-5"])
def test_a_source_is_planned_as_its_artifact(family: str, tmp_path: Path) -> None:
    make_source(tmp_path / "source", family)
    npuq.convert_checkpoint(tmp_path / "source", tmp_path / "artifact", method="minmax")
    plans = []
    for name in ("source", "artifact"):
        with Checkpoint.open(tmp_path / name) as checkpoint:
            plans.append(plan_memory(*read_stored(checkpoint, W4A8), devices=4, memory=GB))
    source, artifact = plans
    assert (source.stored, artifact.stored) == ("as converted by recipe w4a8", "as it is stored")
    assert source.lines == artifact.lines
    assert {line.server for line in source.lines} == {"npuq", "vllm-ascend", "sglang"}


def test_200000_tensors_in_seconds(tmp_path: Path) -> None:
    config = RUN_ON_NPUS["Kimi-K2.5"]
    assert len(write_release(tmp_path / "source", config)) > 200_000
    started = time.process_time()
    with Checkpoint.open(tmp_path / "source") as checkpoint:
        plan = plan_memory(*read_stored(checkpoint, W4A8), devices=16, memory=64 * GB)
    assert plan.recommended == "ep=16,tp=16"
    assert time.process_time() - started < 40


Said = tuple[int, str, str]


def test_the_command(run: Callable[..., Said], tmp_path: Path) -> None:
    path = tmp_path / "v3.json"
    path.write_text(json.dumps(V3))
    status, out, _ = run("doctor", "--plan", path, "--devices", 8, "--memory", "64GB")
    assert status == 0
    assert "deepseek_v3, as converted by recipe w4a8, on 8 devices of 64 GB" in out
    assert "npuq         ep=8,tp=8      45.1 GB    622 MB      70.3 kB       165,963  yes ← recommended" in out
    assert "vllm-ascend  dp=2,tp=4,ep   47.9 GB" in out and "scale_bias of all of them" in out
    assert "--nproc-per-node 8 -m npuq generate … --parallel ep=8,tp=8" in out and "Assumed:" in out
    assert "(--cache-size auto): 11.7 GB a device, 165,888 tokens." in out
    status, out, _ = run("doctor", "--plan", path, "--devices", 4, "--memory", "64GB", "--json")
    plan = json.loads(out)
    assert status == 1 and plan["recommended"] is None and plan["auto_cache"] is None
    assert plan["fewest"]["ranks"] == 8 and not any(line["fits"] for line in plan["layouts"])
    sliced = next(line for line in plan["layouts"] if line["server"] == "sglang" and line["layout"] == "tp=4")
    assert "garbage" in sliced["problem"] and "weights" not in sliced


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plan"], "--plan needs MODEL"),
        (["--plan", "X", "--bench", "--context", "16"], "--plan runs nothing"),
        (["--sequences", "4"], "--sequences is for a measurement: add --bench"),
        (["--devices", "8"], "--devices is for a plan"),
        (["--memory", "64GB"], "--memory is for a plan"),
        (["--plan", "X", "--devices", "0"], "not in the range"),
        (["--plan", "X", "--recipe", "w5a5"], "no recipe named 'w5a5'"),
        (["--plan", "X"], "X: no such directory"),
        (["--plan", "X", "--as", "llama"], "is no family"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str, run: Callable[..., Said]) -> None:
    status, _, err = run("doctor", *arguments)
    assert status in (1, 2) and words in err


def test_hostile_headers_are_refused_in_a_line(run: Callable[..., Said], tmp_path: Path) -> None:
    """A tensor missing, of another shape, and sizes that no memory holds."""
    small = V2_LITE | {"num_hidden_layers": 2}
    write_release(tmp_path / "missing", small)
    (shard, *_) = sorted((tmp_path / "missing").glob("*.safetensors"))
    shard.write_bytes(encode_header([]))
    write_release(tmp_path / "shapes", small)
    (tmp_path / "shapes" / "config.json").write_text(json.dumps(small | {"hidden_size": 4096}))
    (tmp_path / "huge.json").write_text(json.dumps(V3 | {"hidden_size": 1 << 24, "intermediate_size": 1 << 24}))
    (tmp_path / "list.json").write_text("[]")
    for name, words in (("missing", "is not in"), ("shapes", "has shape"), ("list.json", "object")):
        status, _, err = run("doctor", "--plan", tmp_path / name)
        assert status == 1 and words in err and err.count("\n") == 1
    status, out, _ = run("doctor", "--plan", tmp_path / "huge.json")
    assert status == 1 and "No number of such devices holds it" in out


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda nbytes: monkeypatch.setattr(machine, "ram", lambda: machine.PROCESS_BYTES + nbytes)


def test_load_refuses_what_cannot_fit(example_fp8: Path, little_memory: Callable[[int], None], tmp_path: Path) -> None:
    """FP8 is decoded into copies. The weights of an artifact stay in its files: they do not count, the cache does."""
    little_memory(20_000_000)
    with pytest.raises(BackendError, match=r"the model needs .* for weights and .* for a step, .* convert it"):
        npuq.load(example_fp8, "cpu")
    artifact = tmp_path / "artifact"
    npuq.convert_checkpoint(example_fp8, artifact, method="minmax")
    nbytes = sum(file.stat().st_size for file in artifact.glob("*.safetensors"))
    little_memory(nbytes // 2)
    small = EngineConfig(1 << 20, 16, max_num_seqs=2, max_num_batched_tokens=64, prefix_segment_tokens=64)
    assert len(next(iter(npuq.load(artifact, "cpu", engine=small).logits([[5, 6, 7]])))) == 3
    large = EngineConfig(nbytes, 16, max_num_seqs=32, max_num_batched_tokens=64, prefix_segment_tokens=64)
    with pytest.raises(BackendError, match=r"a KV cache of .* does not fit beside .*; \d+ tokens fit, a cache of "):
        npuq.load(artifact, "cpu", engine=large)


def test_what_attention_to_a_long_cache_holds_is_counted() -> None:
    plans = planner(V3, 2000 * GB)
    plan = plans.rank(Layout())
    fits = plan.cache_tokens * plan.cache_token
    plans.check(plan, fits)
    more = fits + plan.cache_token
    assert more < plan.left  # of the cache alone there would be room
    with pytest.raises(BackendError, match=f"; {plan.cache_tokens} tokens fit"):
        plans.check(plan, more)


def test_a_cache_of_automatic_size_is_what_the_plan_leaves() -> None:
    """In whole blocks, as large as all sequences can fill at most, and never more than is free beside the rest."""
    plans = planner(V3)
    plan = plans.rank(Layout(8, 8, 8))
    block = 128 * plan.cache_token
    cache = plans.auto_cache(plan)
    assert cache // plan.cache_token == 165_963 // 128 * 128
    plans.check(plan, cache)
    assert plans.auto_cache(plan, 64 * GB) == cache
    free = 52 * GB
    less = plans.auto_cache(plan, free)
    spent = plan.total_weights.copied + plan.workspace.fixed + plan.cached(less // plan.cache_token)
    assert less < cache and less % block == 0 and free - 2 * block < spent <= free
    huge = replace(plans, memory=10_000 * GB)
    assert huge.auto_cache(huge.rank(Layout(8, 8, 8))) == 32 * 163_840 * plan.cache_token
    with pytest.raises(BackendError, match=r"no room for a KV cache: 45 GB .* give --cache-size") as error:
        plans.auto_cache(plan, 45 * GB)
    assert "\n" not in str(error.value)
    with pytest.raises(BackendError, match=r"16 such devices hold it"):
        planner(KIMI_K2).auto_cache(planner(KIMI_K2).rank(Layout(8, 8, 8)), 64 * GB)


def test_on_the_cpu_a_cache_of_automatic_size_is_2_gib() -> None:
    plans = replace(planner(V3, 2000 * GB), backend=CpuMemory())
    plan = plans.rank(Layout())
    block = 128 * plan.cache_token
    assert plans.auto_cache(plan) == (2 << 30) // block * block
    little = plan.total_weights.copied + plan.workspace.fixed + plan.cached(1000)
    assert plans.auto_cache(plan, little) == 7 * block


def test_load_says_where_free_ram_allows_less(
    example_fp8: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artifact = tmp_path / "artifact"
    npuq.convert_checkpoint(example_fp8, artifact, method="minmax")
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(machine, "_MEMINFO", meminfo)

    def available(nbytes: int) -> None:
        meminfo.write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {(machine.PROCESS_BYTES + nbytes) >> 10} kB\n")

    sizes = EngineConfig(block_size=16, max_num_seqs=32, max_num_batched_tokens=64, prefix_segment_tokens=64)
    available(8 << 30)
    whole = npuq.load(artifact, "cpu", engine=sizes)
    held = whole.cache_bytes // whole.cache_tokens
    assert whole.cache_tokens == 32 * whole.context
    available(0)
    with pytest.raises(BackendError, match=r"^no room for a KV cache: .*give --cache-size[^\n]*$") as error:
        npuq.load(artifact, "cpu", engine=sizes)
    taken = 0
    while "no room" in str(error.value):  # until a part of the cache fits beside weights and a step
        taken += whole.cache_bytes // 4
        available(taken)
        with pytest.raises((BackendError, NpuqWarning)) as error, warnings.catch_warnings():  # type: ignore[assignment]
            warnings.simplefilter("error", NpuqWarning)
            npuq.load(artifact, "cpu", engine=sizes)
    with pytest.warns(NpuqWarning, match=r"free RAM allows a KV cache of .*--cache-size"):
        model = npuq.load(artifact, "cpu", engine=sizes)
    assert 0 < model.cache_tokens < whole.cache_tokens and model.cache_bytes == model.cache_tokens * held
    available(0)
    assert npuq.load(artifact, "cpu", engine=replace(sizes, kv_cache_bytes=1 << 20)).cache_bytes <= 1 << 20


def test_ranks_take_the_cache_that_the_least_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of them a rank is, before anything is loaded; a size that was given is asked of nobody."""
    plans = planner(V3)
    plan = plans.rank(Layout(8, 8, 8))
    sizes, found, asked = EngineConfig(), [], []
    free = (60 * GB, 52 * GB, 55 * GB)
    for own in free:
        monkeypatch.setattr(llm, "free_memory", lambda ops, ranks, own=own: own)
        world = SimpleNamespace(
            least=lambda number: (asked.append(number), min(number, *free))[1],
            launch=SimpleNamespace(local_size=8),
            leads=True,
        )
        found.append(llm._with_cache(sizes, plans, plan, None, world).kv_cache_bytes)  # type: ignore[arg-type]
        given = replace(sizes, kv_cache_bytes=1 << 30)
        assert llm._with_cache(given, plans, plan, None, world) is given  # type: ignore[arg-type]
    assert found == [plans.auto_cache(plan, 52 * GB)] * 3 and asked == list(free)


def test_an_automatic_cache_leaves_a_reserve_on_an_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = SimpleNamespace(name="ascend", device=SimpleNamespace(type="npu"))
    for free, left in ((64 * GB, 60.8 * GB), (18 * GB, 14.8 * GB), (GB, 0)):
        npu = SimpleNamespace(mem_get_info=lambda device, free=free: (free, 64 * GB))
        monkeypatch.setattr(torch, "npu", npu, raising=False)
        assert machine.free_memory(ops, 8) == pytest.approx(left, abs=2)  # type: ignore[arg-type]


def test_the_memory_of_an_npu_is_what_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = SimpleNamespace(name="ascend", dtype=torch.bfloat16, device=SimpleNamespace(type="npu"))
    for free, usable in ((64 * GB, 57.6 * GB), (60 * GB, 57.6 * GB), (18 * GB, 18 * GB)):
        npu = SimpleNamespace(mem_get_info=lambda device, free=free: (free, 64 * GB))
        monkeypatch.setattr(torch, "npu", npu, raising=False)
        found = int(machine.rank_memory(ops, 8) * machine.backend_memory(ops).usable)  # type: ignore[arg-type]
        assert found == pytest.approx(usable, abs=2)


def test_ranks_of_one_machine_share_its_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = SimpleNamespace(name="cpu", dtype=torch.float32, device=torch.device("cpu"))
    monkeypatch.setattr(machine, "ram", lambda: 64 * GB)
    assert machine.rank_memory(ops, 4) == 16 * GB - machine.PROCESS_BYTES  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "limit"), [("1000000\n", 1_000_000), ("max\n", None), ("١٢\n", None), ("9" * 99, None)]
)
def test_the_limit_of_a_container(
    text: str, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    assert list(machine._limits()) == ([] if limit is None else [limit])


def test_families_have_a_plan(tmp_path: Path) -> None:
    """Every family's attention, on every number of ranks that divides it."""
    for family in FAMILIES:
        make_source(tmp_path / family, family)
        with Checkpoint.open(tmp_path / family) as checkpoint:
            plan = plan_memory(*read_stored(checkpoint, W4A8), devices=2, memory=GB)
        assert plan.recommended == "ep=2,tp=2" and plan.fewest is not None and plan.fewest.layout == Layout()


def test_a_contradiction_is_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    write_release(tmp_path / "source", V2_LITE | {"num_hidden_layers": 2})
    (tmp_path / "source" / "config.json").write_text(json.dumps(V2_LITE | {"num_hidden_layers": 3}))
    with Checkpoint.open(tmp_path / "source") as checkpoint, pytest.raises(CheckpointError, match="missing"):
        read_stored(checkpoint, W4A8)
