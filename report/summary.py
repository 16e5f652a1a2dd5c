"""The summary of a report: its few most important numbers, and the lists of outliers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..units import format_bytes
from ..verification.evaluations import evaluated_on
from .calibration import FALLBACKS, Coverage
from .linears import LinearFacts, RoleFacts, root_mean_square
from .style import error, number, scheme_label

if TYPE_CHECKING:
    from .facts import Facts

_LARGEST = 5


@dataclass(frozen=True)
class Tile:
    """One number, its label, and a remark."""

    title: str
    value: str
    remark: str = ""


def tiles(facts: Facts) -> list[Tile]:
    """Size, error of the largest quantized role, perplexity and divergence, calibration: as far as known."""
    made = [_size_tile(facts)]
    quantized = [role for role in facts.roles if role.relative_error is not None]
    if quantized:
        made.append(_error_tile(facts, max(quantized, key=lambda role: role.parameters)))
    if facts.evaluations:
        made += _evaluation_tiles(facts.evaluations[-1])
    if facts.coverage is not None:
        helped = sum(len(layer.fallbacks) for layer in facts.coverage.layers)
        remark = f"{number(helped)} experts reached too little" if helped else "every expert reached"
        made.append(Tile("Calibration", f"{number(facts.coverage.tokens)} tokens", remark))
    return made


def _size_tile(facts: Facts) -> Tile:
    after, before = facts.output_bytes, facts.source_bytes
    if not before:
        return Tile("Size", format_bytes(after))
    return Tile("Size", format_bytes(after), f"{after / before:.0%} of the source's {format_bytes(before)}")


def _error_tile(facts: Facts, role: RoleFacts) -> Tile:
    """The output error, which matters most, where calibration measured it; else the weight error."""
    of = f"{role.role}, {scheme_label(role.scheme)}"
    linears = [linear for linear in facts.linears if (linear.role, linear.scheme) == (role.role, role.scheme)]
    measured = [linear.output_error for linear in linears if linear.output_error is not None]
    if not measured:
        return Tile("Weight error", error(role.relative_error), of)
    remark = f"{of}, root mean square on calibration inputs; of the weights {error(role.relative_error)}"
    return Tile("Output error", error(root_mean_square(measured)), remark)


def _evaluation_tiles(entry: Mapping[str, Any]) -> list[Tile]:
    where = f"{evaluated_on(entry)}, context {entry['context']}"
    source, divergence, agreement = (entry.get(k) for k in ("source_perplexity", "kl_divergence", "top1_agreement"))
    change = "" if source is None else f"{entry['perplexity'] / source - 1:+.2%} from the source's, "
    made = [Tile("Perplexity", f"{entry['perplexity']:.3f}", change + where)]
    if divergence is not None:
        agreed = "" if agreement is None else f"nats a token; top-1 agreement {agreement:.2%}"
        made.append(Tile("KL to the source", f"{divergence:.2g}", agreed))
    return made


def largest_errors(linears: Sequence[LinearFacts]) -> list[LinearFacts]:
    """The few linears with the largest weight errors of every scheme, all of them largest first."""
    known = [linear for linear in linears if linear.relative_error is not None]
    ranked = sorted(known, key=lambda linear: (-(linear.relative_error or 0.0), linear.name))
    schemes = dict.fromkeys(linear.scheme for linear in ranked)
    return [linear for scheme in schemes for linear in [of for of in ranked if of.scheme == scheme][:_LARGEST]]


def unreached(coverage: Coverage) -> list[tuple[int, str, list[int]]]:
    """Groups (layer, fallback, experts) of experts that calibration reached too little."""
    return [
        (layer.layer, kind, experts)
        for layer in coverage.layers
        for kind in FALLBACKS
        if (experts := sorted(expert for expert, what in layer.fallbacks.items() if what == kind))
    ]
