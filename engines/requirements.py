"""Requirements of the engines on an artifact's schemes, checked against the tensors of a real checkpoint.

Read from the model loaders of vLLM-Ascend and SGLang (August 2026). A conversion that breaks a requirement would run
for hours, and its result would load nowhere, or load wrongly. So a recipe is refused before any work, and `npuq verify`
checks an artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypedDict

from ..formats.schemes import Scheme
from ..models.family import Block
from ..models.roles import INDEXER, QUANTIZABLE, ROUTED, Role
from ..models.tensors import Spec
from ..recipes.recipe import Target

SchemeOf = Callable[[str], Scheme]


@dataclass(frozen=True)
class Violation:
    """A tensor whose scheme breaks a requirement."""

    spec: Spec
    scheme: Scheme
    why: str

    def __str__(self) -> str:
        return f"{self.scheme.value} for {self.spec.name!r}: {self.why}"


class ConfigSchemes(TypedDict):
    """The scheme arguments of `artifact_config`."""

    linear: Scheme
    experts: Scheme
    mtp_experts: Scheme


def violations(specs: Mapping[str, Spec], scheme_of: SchemeOf, target: Target) -> Iterator[Violation]:
    """Every tensor whose scheme some loader of `target` would refuse or misread."""
    for spec in specs.values():
        scheme = scheme_of(spec.name)
        why = _forbidden(spec, scheme, target)
        if why is not None:
            yield Violation(spec, scheme, why)
    yield from _static_with_bias(specs, scheme_of, target)
    yield from _split_groups(specs, scheme_of)
    yield from _split_preprocessing(specs, scheme_of)
    yield from _mixed_experts(specs, scheme_of)


def config_schemes(specs: Iterable[Spec], schemes: Mapping[str, Scheme]) -> ConfigSchemes:
    """The schemes that config.json states: for linears, experts and MTP experts, the one that all of them share.

    FLOAT (which config.json leaves out) where they differ, so that no engine takes a fast path meant for one scheme.
    """
    found: dict[str, set[Scheme]] = {"linear": set(), "experts": set(), "mtp_experts": set()}
    for spec in specs:
        if spec.role is Role.ROUTED_EXPERT:
            found["experts"].add(schemes[spec.name])
        elif spec.role is Role.MTP_ROUTED_EXPERT:
            found["mtp_experts"].add(schemes[spec.name])
        elif spec.role in (Role.ATTENTION, Role.DENSE_MLP, Role.SHARED_EXPERT):
            found["linear"].add(schemes[spec.name])
    common = {part: parts.pop() if len(parts) == 1 else Scheme.FLOAT for part, parts in found.items()}
    return ConfigSchemes(linear=common["linear"], experts=common["experts"], mtp_experts=common["mtp_experts"])


def _forbidden(spec: Spec, scheme: Scheme, target: Target) -> str | None:
    if scheme is not Scheme.FLOAT and spec.role not in QUANTIZABLE:
        return f"the role {spec.role} must stay FLOAT in every loader"
    if scheme is Scheme.W4A8 and spec.role is not Role.ROUTED_EXPERT:
        return "W4A8_DYNAMIC exists only for the main model's routed experts; use W8A8_DYNAMIC here"
    if scheme is Scheme.W8A8_STATIC and spec.role in ROUTED:
        return "no loader has routed experts with a static input scale; use W4A8_DYNAMIC or W8A8_DYNAMIC here"
    if scheme is Scheme.W8A8_STATIC and spec.role in INDEXER:
        return "no loader has indexers with a static input scale; use W8A8_DYNAMIC or FLOAT here"
    if scheme is Scheme.FLOAT and spec.role in ROUTED and target is Target.ENGINES:
        return "engines refuse FLOAT routed experts; give them a scheme, or set 'target: npuq'"
    return None


def _static_with_bias(specs: Mapping[str, Spec], scheme_of: SchemeOf, target: Target) -> Iterator[Violation]:
    """Static linears that have a bias beside `quant_bias`: engines add the latter alone."""
    for spec in specs.values():
        if spec.entry is None or spec.entry.kind != "bias":
            continue
        linear = spec.name.removesuffix("bias") + "weight"
        if linear in specs and scheme_of(linear) is Scheme.W8A8_STATIC:
            why = (
                f"engines leave out the bias {spec.name!r} of a linear with a static input scale; use W8A8_DYNAMIC here"
            )
            yield Violation(specs[linear], Scheme.W8A8_STATIC, why)


def fused_pairs(specs: Mapping[str, Spec]) -> Iterator[tuple[str, str]]:
    """Pairs (first, other) of weights that loaders fuse into one parameter: gate|up, q_a|kv_a."""

    def place(spec: Spec, part: str) -> tuple[int | None, Block | None, int | None, str]:
        return spec.layer, spec.block, spec.expert, part

    fused = [(spec, spec.entry.part, spec.entry.fused) for spec in specs.values() if spec.entry and spec.entry.fused]
    leaders = {place(spec, part): spec.name for spec, part, leading in fused if part == leading}
    for spec, part, leading in fused:
        leader = leaders.get(place(spec, leading))
        if part != leading and leader is not None:
            yield leader, spec.name


def _split_groups(specs: Mapping[str, Spec], scheme_of: SchemeOf) -> Iterator[Violation]:
    """Projections that loaders fuse into one parameter, but whose schemes differ."""
    for leader, name in fused_pairs(specs):
        if scheme_of(name) is not scheme_of(leader):
            group = f"{specs[leader].module} and {specs[name].module}"
            why = f"{leader!r} is {scheme_of(leader).value}; engines fuse {group}: give them one scheme"
            yield Violation(specs[name], scheme_of(name), why)


def _split_preprocessing(specs: Mapping[str, Spec], scheme_of: SchemeOf) -> Iterator[Violation]:
    """Projections of sparse MLA that vLLM-Ascend's fused preprocessing (`npu_mla_prolog_v3`) reads by one scheme.

    It is taken where the layer's own `wq_b` is quantized, and in layers without one. It then reads q_b by the scheme of
    q_a and kv_a, unchecked (`sfa_v1.py`, vLLM-Ascend 0.30.0rc2).
    """
    for parts in sparse_layers(specs):
        index_q, first = parts.get("index_q"), parts["q_a"]
        quantized = index_q is not None and scheme_of(index_q.name) is not Scheme.FLOAT
        if index_q is not None and not index_q.optional and not quantized:
            continue  # each projection by itself
        for spec in (parts[part] for part in ("q_a", "kv_a", "q_b") if part in parts):
            scheme = scheme_of(spec.name)
            if index_q is not None and quantized and scheme is not Scheme.W8A8:
                why = f"{index_q.name!r} is {scheme_of(index_q.name).value}; then {spec.module} must be W8A8_DYNAMIC"
                yield Violation(spec, scheme, f"{why}, or both FLOAT")
            elif scheme is not scheme_of(first.name):
                why = f"{first.name!r} is {scheme_of(first.name).value}; engines read both by one scheme: give them one"
                yield Violation(spec, scheme, why)


def sparse_layers(specs: Mapping[str, Spec]) -> Iterator[dict[str, Spec]]:
    """The attention's tensors by part, of each layer of a model with indexers; nothing of any other model."""
    if not any(spec.role in INDEXER for spec in specs.values()):
        return
    layers: dict[int | None, dict[str, Spec]] = {}
    for spec in specs.values():
        if spec.block is Block.ATTENTION and spec.entry is not None:
            layers.setdefault(spec.layer, {})[spec.entry.part] = spec
    yield from (parts for parts in layers.values() if "q_a" in parts)


def _mixed_experts(specs: Mapping[str, Spec], scheme_of: SchemeOf) -> Iterator[Violation]:
    """Routed experts of a layer whose schemes differ: each of their projections is one grouped matmul."""
    first: dict[int | None, Spec] = {}
    for name, spec in specs.items():
        if spec.role not in ROUTED:
            continue
        leader = first.setdefault(spec.layer, spec)
        if scheme_of(name) is not scheme_of(leader.name):
            why = f"{leader.name!r} is {scheme_of(leader.name).value}; all experts of a layer need one scheme"
            yield Violation(spec, scheme_of(name), why)
