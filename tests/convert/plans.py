"""Plans of random tensors, without a checkpoint."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace

from hypothesis import strategies as st

from npuq.convert.plan.assignments import Assignment
from npuq.convert.plan.plan import build_plan
from npuq.formats.schemes import Scheme
from npuq.models.family import Entry
from npuq.models.inventory import Inventory
from npuq.models.roles import Role
from npuq.models.tensors import Spec
from npuq.quant.scales import Method


def plan_of(tensors: list[tuple[str, tuple[int, ...], Scheme]], max_shard_size: int):
    specs, weights, assignments = {}, {}, {}
    for name, shape, scheme in tensors:
        role = Role.ROUTED_EXPERT if scheme is Scheme.W4A8 else Role.ATTENTION
        entry = Entry("down", name, role, (), row_parallel="down_proj" in name)
        specs[name] = Spec(name, role, shape, 0, entry=entry)
        weights[name] = SimpleNamespace(shape=shape, dtype="BF16", float_code="BF16", nbytes=2 * prod(shape))
        assignments[name] = Assignment(scheme, Method.MINMAX, 1)
    inventory = Inventory(specs, (), (), (), ())
    return build_plan(weights, inventory, assignments, max_shard_size)


@st.composite
def tensors(draw):
    count = draw(st.integers(1, 25))
    result = []
    for number in range(count):
        scheme = draw(st.sampled_from(list(Scheme)))
        rows = draw(st.integers(1, 40)) * (2 if scheme is Scheme.W4A8 else 1)
        columns = draw(st.integers(1, 20)) * (16 if scheme is Scheme.W4A8 else 1)
        name = draw(st.sampled_from(["down_proj", "gate_proj", 'odd"名\n']))
        result.append((f"layers.{number}.{name}.weight", (rows, columns), scheme))
    return result
