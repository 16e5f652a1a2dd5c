"""The check itself: load an artifact with an engine, every rank of it, and compare what its operators compute.

For each quantized linear the same int8 rows go to the emulated NPU operators, with the operands that the engine made of
the artifact, and to npuq's own runtime; each rank's part is put beside the others' or added to them, as the layer asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from npuq.formats.artifact import read_description
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.schemes import SUFFIXES, WEIGHT, Scheme
from npuq.formats.static_w8a8 import static_tensors
from npuq.models.config import ModelConfig
from npuq.runtime.ops import LinearPart, Quantized, Static
from npuq.runtime.ops.reference import ReferenceOps
from npuq.runtime.store import ArtifactStore

from .names import FUSED, PARTS, stored_name

TOLERANCE = 1e-5
ROWS = 3


class ConformanceError(Exception):
    """The engine computes something else than npuq's runtime."""


@dataclass(frozen=True)
class Loaded:
    """All ranks of a model in an engine. `rename`: an engine's module name → the artifact's.
    `borrowed`: parts of names of modules whose weights come from another model."""

    directory: Path
    ranks: Sequence[dict[str, nn.Module]]
    moe_tp: int
    rename: Callable[[str], str]
    borrowed: tuple[str, ...]


def load(engine: ModuleType, directory: Path, tp: int, ep: int = 1, mtp: bool = False) -> Loaded:
    """Every rank of the model, or of its MTP draft."""
    with Checkpoint.open(directory) as checkpoint:
        last = ModelConfig.from_dict(checkpoint.config).num_hidden_layers
        released = "embed.weight" in checkpoint.tensors

        def weights() -> Iterator[tuple[str, Tensor]]:
            for name in checkpoint.tensors:
                yield name, checkpoint.read(name)

        models = [engine.build(directory, weights(), tp, ep, rank, mtp) for rank in range(tp)]
    return Loaded(
        directory,
        [dict(model.named_modules()) for model in models],
        tp // ep,
        lambda name: stored_name(name, last, mtp=mtp, released=released),
        engine.BORROWED_BY_DRAFT if mtp else (),
    )


def quantized_linears(directory: Path, mtp: bool = False) -> int:
    """The quantized linears of the model or its first MTP layer: fused ones, and experts of a layer, count as one."""
    found = set()
    with Checkpoint.open(directory) as checkpoint:
        config = ModelConfig.from_dict(checkpoint.config)
        last = config.num_hidden_layers
        for name in (name for name, info in checkpoint.tensors.items() if info.dtype == "I8"):
            module, leaf = name.removesuffix(".weight").rsplit(".", 1)
            layer = config.layer_of(name)
            assert layer is not None
            if layer == last if mtp else layer < last:
                experts, _, expert = module.rpartition(".experts.")
                found.add((experts, "experts") if expert.isdigit() else (module, PARTS.get(leaf, leaf)))
    return len(found)


def compare(loaded: Loaded) -> int:
    """Compare every tensor of the model, and count the quantized linears, a layer's experts as one.

    Raises ConformanceError for the first that differs, or that the engine has no parameter for.
    """
    count = 0
    with Checkpoint.open(loaded.directory) as checkpoint:
        comparison = Comparison(loaded, checkpoint)
        comparison.tags()
        for name, module in loaded.ranks[0].items():
            if any(part in name for part in loaded.borrowed):
                continue
            weight = getattr(module, "weight", None)
            if hasattr(module, "w13_weight"):
                comparison.experts(name)
                count += 1
            elif isinstance(weight, Tensor) and weight.dtype == torch.int8:
                comparison.linear(name)
                count += 1
            else:
                for leaf, _ in module.named_parameters(recurse=False):
                    comparison.same(f"{name}.{leaf}" if name else leaf)
        comparison.all_compared()
    return count


class Comparison:
    """One model against npuq's runtime."""

    def __init__(self, loaded: Loaded, checkpoint: Checkpoint):
        self.loaded, self.checkpoint = loaded, checkpoint
        self.store = ArtifactStore(checkpoint)
        self.ops = ReferenceOps()
        self.generator = torch.Generator().manual_seed(7)
        self.compared: set[str] = set()

    def tags(self) -> None:
        """The description's other entries. Engines read those of weights that can be quantized and trust the rest."""
        types, stored = read_description(self.loaded.directory) or {}, self.checkpoint.tensors
        # With the bias of a norm in the description, both engines would give every RMS norm one.
        listed = {name for name in stored if "norm.bias" not in name}
        if types.keys() != listed:
            raise ConformanceError(f"the description lacks or adds {sorted(types.keys() ^ listed)[0]}")
        for name, scheme in types.items():
            weight = f"{name.rpartition('.')[0]}.weight"
            # The bias of a quantized linear stays as it is.
            quantized = weight in stored and stored[weight].dtype == "I8" and not name.endswith(".bias")
            if scheme is not (types[weight] if quantized else Scheme.FLOAT):
                raise ConformanceError(f"{name}: described as {scheme.value}, which its weight is not")

    def all_compared(self) -> None:
        """Every tensor of the model, or of the draft's layer, has been compared, but those that are borrowed."""
        config = ModelConfig.from_dict(self.checkpoint.config)
        last, mtp = config.num_hidden_layers, bool(self.loaded.borrowed)
        for name in self.checkpoint.tensors.keys() - self.compared:
            layer = config.layer_of(name)
            mine = layer == last if mtp else layer is None or layer < last
            if mine and not any(part in name for part in ("embed_tokens", "shared_head.head") if mtp):
                raise ConformanceError(f"{name}: no parameter of the engine was compared with it")

    def same(self, name: str) -> None:
        """A float tensor, or a table: the same on every rank, or in rows or columns over the ranks, padded at the end.

        A parameter of no tensor is passed over: it was filled from another, or check_filled complains.
        """
        module, _, leaf = name.rpartition(".")
        path, _, linear = module.rpartition(".")
        names = [self.loaded.rename(name)]
        if names[0] not in self.checkpoint.tensors and linear in FUSED:
            names = [self.loaded.rename(f"{path}.{part}.{leaf}") for part in FUSED[linear]]
        if any(stored not in self.checkpoint.tensors for stored in names):
            return
        self.compared.update(names)
        stored = torch.cat([self.checkpoint.read(part) for part in names])
        held = [getattr(modules[module], leaf).data for modules in self.loaded.ranks]
        if held[0].dim() > stored.dim():  # wo_a, for a product by groups of heads: [groups, inputs, outputs]
            held = [tensor.transpose(1, 2).flatten(0, 1) for tensor in held]
        whole = [tensor for tensor in held if tensor.shape == stored.shape]
        for tensor in whole or [_together(held, len(stored), 3 if "qkv" in module else 1)]:
            # A router may be held in float32, a table in int32; nothing may be held in less than it is stored in.
            allowed = (stored.dtype, torch.float32) if stored.is_floating_point() else (stored.dtype, torch.int32)
            if tensor.dtype not in allowed or not torch.equal(tensor.to(stored.dtype), stored):
                raise ConformanceError(f"{name}: {tensor.dtype} {list(tensor.shape)} is not what the artifact has")

    def parts(self, name: str, names: Sequence[str]) -> list[LinearPart]:
        path = name.rpartition(".")[0]
        found = []
        for part in (self.loaded.rename(f"{path}.{part}") for part in names):
            scale = self.checkpoint.tensors[f"{part}.weight_scale"].shape[0]
            inputs = self.checkpoint.tensors[f"{part}.weight"].shape[1]
            offset = self.checkpoint.read(f"{part}.weight_offset")
            if offset.shape != (scale, 1) or bool(offset.any()):
                raise ConformanceError(f"{part}.weight_offset: {list(offset.shape)} zeros are wanted")
            found.append(self.store.linear(part, scale, inputs))
            self.compared.update(f"{part}.{suffix}" for suffix in (WEIGHT, *SUFFIXES))
        return found

    def rows(self, count: int, width: int) -> Quantized:
        codes = torch.randint(-127, 128, (count, width), generator=self.generator, dtype=torch.int8)
        return Quantized(codes, torch.rand(count, generator=self.generator, dtype=torch.float32) + 0.5)

    def linear(self, name: str) -> None:
        leaf = name.rpartition(".")[2]
        parts = self.parts(name, FUSED.get(leaf, (leaf,)))
        if parts[0].scheme is Scheme.W8A8_STATIC:
            self.static(name, parts)
            return
        if parts[0].scheme is not Scheme.W8A8:
            raise ConformanceError(f"{name}: {parts[0].scheme.value} where the engine has int8")
        x = self.rows(ROWS, parts[0].weight.shape[1])
        # Both engines keep the scales of linears in the model's dtype.
        ours = self.ops.products.linear(x, self.ops.weights.w8a8_linear([_rounded(part) for part in parts]))
        outputs = []
        for rank, modules in enumerate(self.loaded.ranks):
            module = modules[name]
            taken = _columns(x, module.weight.shape[0], rank)
            scale = module.weight_scale.data.float()
            outputs.append(
                torch.ops.npu.npu_quant_matmul(
                    taken.codes, module.weight.data, scale, pertoken_scale=taken.scale, output_dtype=torch.float32
                )
            )
        sizes = [part.weight.shape[0] for part in parts]
        held = self.loaded.ranks[0][name].weight.shape[0]
        _equal(name, _gather(outputs, sizes, outputs[0].shape[1], held, x), ours)
        self.biases(name, parts, held, x)

    def biases(self, name: str, parts: Sequence[LinearPart], held: int, x: Quantized) -> None:
        """The biases of a linear's parts, which the engine adds to its outputs."""
        path, _, leaf = name.rpartition(".")
        biases = [self.loaded.rename(f"{path}.{part}.bias") for part in FUSED.get(leaf, (leaf,))]
        stored = [bias for bias in biases if bias in self.checkpoint.tensors]
        modules = [modules[name] for modules in self.loaded.ranks]
        has_bias = [isinstance(module.bias, Tensor) for module in modules]
        if any(has_bias) != bool(stored) or any(has_bias) != all(has_bias):
            raise ConformanceError(f"{name}: a bias, or none, where the artifact has {len(stored)}")
        self.compared.update(stored)
        if stored:
            ours = torch.cat([self.checkpoint.read(bias).float() for bias in stored])[None]
            theirs = [module.bias.data.float()[None] for module in modules]
            sizes = [part.weight.shape[0] for part in parts]
            _equal(f"{name}.bias", _gather(theirs, sizes, theirs[0].shape[1], held, x), ours)

    def static(self, name: str, parts: Sequence[LinearPart]) -> None:
        """Activations by the engine's scale in the model's dtype, then the product: codes equal, sums equal."""
        inputs = parts[0].weight.shape[1]
        x = (4 * torch.randn(ROWS, inputs, generator=self.generator)).bfloat16()
        reference = ReferenceOps(torch.bfloat16)
        codes = reference.products.static_quant(x, reference.weights.static_linear(parts))
        handle = self.ops.weights.static_linear([self.recomputed(part) for part in parts])
        ours = self.ops.products.scale_sums(self.ops.products.integer_sums(codes, handle), None, handle)
        outputs = []
        held = self.loaded.ranks[0][name].weight.shape[0]
        for rank, modules in enumerate(self.loaded.ranks):
            module = modules[name]
            mine = x if held == inputs else x[:, rank * held : (rank + 1) * held].contiguous()
            offset = module.aclnn_input_offset.data.to(x.dtype)
            factor = module.aclnn_input_scale_reciprocal.data[: mine.shape[1]]
            theirs = torch.ops.npu.npu_quantize(mine, factor, offset[: mine.shape[1]], torch.qint8, -1, False)
            expected = codes if held == inputs else codes[:, rank * held : (rank + 1) * held]
            if not torch.equal(theirs, expected):
                raise ConformanceError(f"{name}: activations become other codes")
            # Where inputs are split, both engines add the bias on the first rank alone.
            bias = module.quant_bias.data if held == inputs or rank == 0 else None
            outputs.append(
                torch.ops.npu.npu_quant_matmul(
                    theirs, module.weight.data, module.deq_scale.data, bias=bias, output_dtype=torch.float32
                )
            )
        sizes = [part.weight.shape[0] for part in parts]
        rows = Quantized(codes, torch.ones(ROWS))
        _equal(name, _gather(outputs, sizes, outputs[0].shape[1], held, rows), ours)

    def recomputed(self, part: LinearPart) -> LinearPart:
        """A static linear whose deq_scale and quant_bias follow from its codes and scales, whatever is stored."""
        assert part.static is not None
        scale = self.checkpoint.read(f"{part.name}.weight_scale")
        made = static_tensors(part.weight, scale, part.static.inputs)
        return replace(part, static=Static(part.static.inputs, made["deq_scale"], made["quant_bias"]))

    def experts(self, name: str) -> None:
        """Gate and up of all experts at once, then down: the two grouped matmuls of a layer."""
        for leaf, names in (("w13", ("gate_proj", "up_proj")), ("w2", ("down_proj",))):
            self.grouped(name, leaf, names)

    def grouped(self, name: str, leaf: str, names: Sequence[str]) -> None:
        local = getattr(self.loaded.ranks[0][name], f"{leaf}_weight").shape[0]
        count = local * len(self.loaded.ranks) // self.loaded.moe_tp
        experts = [self.parts(f"{name}.{expert}.x", names) for expert in range(count)]
        scheme = experts[0][0].scheme
        if scheme is Scheme.W8A8:
            experts = [[_rounded(part) for part in parts] for parts in experts]
        inputs = experts[0][0].weight.shape[1]
        x = self.rows(count * ROWS, inputs)
        counts = torch.full((count,), ROWS)
        ours = self.ops.products.grouped_matmul(x, self.ops.weights.experts_of(experts), counts)
        sizes = [parts.scale.shape[0] for parts in experts[0] if parts.scale is not None]
        done = []
        for first in range(0, len(self.loaded.ranks), self.loaded.moe_tp):
            start = first // self.loaded.moe_tp * local * ROWS
            rows = Quantized(x.codes[start : start + local * ROWS], x.scale[start : start + local * ROWS])
            members = range(first, first + self.loaded.moe_tp)
            outputs = [self.product(name, leaf, rank, rows, scheme) for rank in members]
            held = getattr(self.loaded.ranks[0][name], f"{leaf}_weight").shape[1]
            done.append(_gather(outputs, sizes, outputs[0].shape[1], held, x))
        _equal(f"{name}.{leaf}", torch.cat(done), ours)

    def product(self, name: str, leaf: str, rank: int, rows: Quantized, scheme: Scheme) -> Tensor:
        module = self.loaded.ranks[rank][name]
        weight = getattr(module, f"{leaf}_weight").data
        taken = _columns(rows, weight.shape[1], rank % self.loaded.moe_tp)
        scale = getattr(module, f"{leaf}_weight_scale").data.reshape(weight.shape[0], -1)
        extra = {}
        if (weight.dtype == torch.int32) != (scheme is Scheme.W4A8):
            raise ConformanceError(f"{name}.{leaf}: {weight.dtype} for {scheme.value}")
        if scheme is Scheme.W4A8:
            # The per-channel scale is [E, N] for vLLM-Ascend's fused operator, [E, 1, N] for the plain one.
            scale, extra["bias"] = scale.unsqueeze(1), [getattr(module, f"{leaf}_scale_bias").data]
        return torch.ops.npu.npu_grouped_matmul(
            [taken.codes.clone()],
            [weight],
            scale=[scale if scheme is Scheme.W4A8 else scale.float()],
            per_token_scale=[taken.scale],
            group_list=torch.full((weight.shape[0],), ROWS),
            split_item=2,
            group_type=0,
            group_list_type=1,
            output_dtype=torch.float32,
            **extra,
        )[0]


def _together(held: Sequence[Tensor], rows: int, fused: int) -> Tensor:
    """The whole of which each rank has a share of the columns, or of the rows of each of `fused` matrices."""
    if len(held[0]) == rows:
        return torch.cat(list(held), dim=1)
    pieces = zip(*(tensor.chunk(fused) for tensor in held), strict=True)
    return torch.cat([torch.cat(piece) for piece in pieces])[:rows]


def _rounded(part: LinearPart) -> LinearPart:
    assert part.scale is not None
    return LinearPart(part.name, part.scheme, part.weight, part.scale.bfloat16().float(), part.scale_bias)


def _columns(x: Quantized, width: int, rank: int) -> Quantized:
    """The inputs of a rank that holds `width` of them; all of them where it holds all."""
    if width == x.codes.shape[1]:
        return x
    return Quantized(x.codes[:, rank * width : (rank + 1) * width].contiguous(), x.scale)


def _gather(outputs: Sequence[Tensor], sizes: Sequence[int], width: int, held: int, x: Quantized) -> Tensor:
    """Ranks' outputs put together: added where inputs are split, side by side where outputs are, else the first."""
    if held < x.codes.shape[1]:
        return torch.stack(list(outputs)).sum(dim=0)
    if width == sum(sizes):
        for other in outputs[1:]:
            _equal("replicated", other, outputs[0])
        return outputs[0]
    shares = [size // len(outputs) for size in sizes]
    if sum(shares) != width:  # fewer key and value heads than ranks, which hold each several times
        shares[1:] = [(width - shares[0]) // (len(sizes) - 1)] * (len(sizes) - 1)
    pieces = [output.split(shares, dim=1) for output in outputs]
    whole = []
    for index, size in enumerate(sizes):
        times = shares[index] * len(outputs) // size
        part = [piece[index] for piece in pieces]
        for rank, other in enumerate(part):
            _equal("repeated", other, part[rank - rank % times])
        whole += part[::times]
    return torch.cat(whole, dim=1)


def _equal(name: str, theirs: Tensor, ours: Tensor) -> None:
    if theirs.shape != ours.shape:
        raise ConformanceError(f"{name}: {list(theirs.shape)} in the engine, {list(ours.shape)} here")
    error = float((theirs - ours).abs().max() / ours.abs().max())
    if not error <= TOLERANCE:
        raise ConformanceError(f"{name}: differs by {error:.2g} of the greatest output")
