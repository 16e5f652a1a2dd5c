"""The figures of a report, in plotly: plain numbers go in, so that the page holds them as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go

from .calibration import Coverage
from .coverage_figure import coverage_figure
from .facts import Facts
from .heat_map import heat_map
from .linears import LinearFacts, RoleFacts, root_mean_square
from .scale_histogram import BINS_PER_OCTAVE, ScaleHistogram
from .style import AFTER, BEFORE, COLOURS, PERCENT, error, laid_out, plain, scheme_label

ErrorOf = Callable[[LinearFacts], "float | None"]

_SMALL = 0.01  # of the total bytes
# The measure that calibration minimizes comes first.
_MEASURES: dict[str, ErrorOf] = {
    "output error": lambda linear: linear.output_error,
    "weight error": lambda linear: linear.relative_error,
}


def figures(facts: Facts) -> dict[str, Any]:
    """Every figure that these facts allow, by name: sizes, layers, scales, coverage, smoothing, cache; and `experts …`
    and `linears …`, with scheme and measure."""
    made: dict[str, Any] = {}
    if facts.roles:
        made["sizes"] = size_figure(facts.roles)
    made |= _error_figures(facts.linears)
    if lines := output_errors(facts):
        made["layers"] = layer_figure(lines, "relative error of the output")
    if facts.scales:
        made["scales"] = scale_figure(facts.scales)
    if facts.coverage is not None and any(layer.expert_tokens for layer in facts.coverage.layers):
        made["coverage"] = coverage_figure(facts.coverage)
    if facts.coverage is not None and any(layer.smoothing for layer in facts.coverage.layers):
        made["smoothing"] = smoothing_figure(facts.coverage)
    if facts.coverage is not None and (line := _cache_errors(facts.coverage))[1]:
        made["cache"] = layer_figure([line], "relative error of the latent")
    return made


def _error_figures(linears: Sequence[LinearFacts]) -> dict[str, Any]:
    """A figure for each scheme, the one with the largest errors first: beside int4's, int8's errors would all have one
    colour."""
    made: dict[str, Any] = {}
    by_error = sorted(linears, key=lambda linear: -(linear.relative_error or 0.0))
    for scheme in dict.fromkeys(linear.scheme for linear in by_error):
        for kind, draw, chosen in (
            ("experts", expert_figure, [x for x in linears if x.scheme == scheme and x.expert is not None]),
            ("linears", linear_figure, [x for x in linears if x.scheme == scheme and x.expert is None]),
        ):
            for measure, error_of in _MEASURES.items():
                if any(error_of(linear) is not None for linear in chosen):
                    made[f"{kind} {scheme_label(scheme)}, {measure}"] = draw(chosen, error_of)
    return made


def size_figure(roles: Sequence[RoleFacts]) -> Any:
    """Bytes before (where known) and after, by role, the largest on top and the small ones together."""
    rows = list(reversed(_small_together(roles)))
    names = [f"{role.role} ({scheme_label(role.scheme)})" if role.scheme else role.role for role in rows]
    unit, divisor = _unit(max(max(role.source_bytes or 0, role.output_bytes) for role in rows))
    figure = go.Figure()
    bars = [("after", AFTER, [role.output_bytes for role in rows])]
    if all(role.source_bytes is not None for role in rows):
        bars.append(("before", BEFORE, [role.source_bytes or 0 for role in rows]))
    for label, colour, values in bars:
        figure.add_bar(
            y=names,
            x=[value / divisor for value in values],
            customdata=values,
            name=label,
            orientation="h",
            marker_color=colour,
            hovertemplate=f"%{{y}}, {label}: %{{x:.4g}} {unit} (%{{customdata:,}} bytes)<extra></extra>",
        )
    figure.update_xaxes(title=unit)
    figure.update_layout(bargap=0.25, bargroupgap=0.05, legend_traceorder="reversed", showlegend=len(bars) > 1)
    return laid_out(figure, 110 + 30 * len(names))


def expert_figure(linears: Sequence[LinearFacts], error_of: ErrorOf) -> Any:
    """Error by layer and expert: the root mean square over its projections."""
    cells: dict[tuple[int, int], list[LinearFacts]] = {}
    for linear in linears:
        if linear.expert is not None:
            cells.setdefault((linear.layer, linear.expert), []).append(linear)
    layers = sorted({layer for layer, _ in cells})
    experts = list(range(max(expert for _, expert in cells) + 1))
    at = [[cells.get((layer, expert), []) for expert in experts] for layer in layers]
    return heat_map(
        experts,
        [str(layer) for layer in layers],
        [[root_mean_square([error_of(linear) for linear in cell]) for cell in row] for row in at],
        [[_parts(cell, error_of) for cell in row] for row in at],
        "layer %{y}, expert %{x}: %{z:.3%}<br>%{text}<extra></extra>",
    ).update_xaxes(title="expert")


def linear_figure(linears: Sequence[LinearFacts], error_of: ErrorOf) -> Any:
    """Error of other linears, by layer and projection."""
    projections = list(dict.fromkeys(linear.projection for linear in linears))
    layers = sorted({linear.layer for linear in linears})
    found = {(linear.layer, linear.projection): linear for linear in linears}
    at = [[found.get((layer, projection)) for projection in projections] for layer in layers]
    return heat_map(
        projections,
        [str(layer) for layer in layers],
        [[None if linear is None else error_of(linear) for linear in row] for row in at],
        [["" if linear is None else f"{linear.name}, {scheme_label(linear.scheme)}" for linear in row] for row in at],
        "layer %{y}: %{z:.3%}<br>%{text}<extra></extra>",
    )


def smoothing_figure(coverage: Coverage) -> Any:
    """Strength of smoothing by layer and place."""
    layers = [layer for layer in coverage.layers if layer.smoothing]
    names = list(dict.fromkeys(name for layer in layers for name in layer.smoothing))
    figure = heat_map(
        [name.removeprefix("mlp.") for name in names],
        [str(layer.layer) for layer in layers],
        [[layer.smoothing.get(name) for name in names] for layer in layers],
        [names for _ in layers],
        "layer %{y}, %{text}: %{z:.2f}<extra></extra>",
    )
    return figure.update_traces(colorbar_tickformat=".2f")


def output_errors(facts: Facts) -> list[tuple[str, list[int], list[float]]]:
    """Lines of (name, layers, relative errors of their output): as calibration left them, and as evaluated."""
    lines = []
    evaluated: dict[tuple[str, str], tuple[str, list[int], list[float]]] = {}
    if facts.coverage is not None:
        known = [(layer.layer, layer.output_error) for layer in facts.coverage.layers if layer.output_error is not None]
        lines.append(("on the calibration set", [layer for layer, _ in known], [error for _, error in known]))
    for entry in facts.evaluations:
        # The errors of layers do not depend on the KV cache: results that differ in it alone share their lines.
        stored, where = entry.get("layers", []), f"on {entry['text']}, context {entry['context']}"
        numbers = [layer["layer"] for layer in stored]
        for name, key in (("accumulated", "relative_error"), ("of the layer alone", "own_relative_error")):
            if stored:
                line = f"{name}, {where}"
                evaluated[line, entry["text_sha256"]] = line, numbers, [layer[key] for layer in stored]
    return [line for line in (*lines, *evaluated.values()) if line[1]]


def _cache_errors(coverage: Coverage) -> tuple[str, list[int], list[float]]:
    known = [(layer.layer, layer.kv_cache_error) for layer in coverage.layers if layer.kv_cache_error is not None]
    return "on the calibration set", [layer for layer, _ in known], [error for _, error in known]


def layer_figure(lines: Sequence[tuple[str, list[int], list[float]]], title: str) -> Any:
    """An error of every layer, a line for every measurement."""
    figure = go.Figure()
    for index, (name, numbers, values) in enumerate(lines):
        figure.add_scatter(
            x=numbers,
            y=values,
            name=plain(name),
            mode="lines+markers",
            line_color=COLOURS[index % len(COLOURS)],
            hovertemplate="layer %{x}: %{y:.3%}",
        )
    most = max(len(numbers) for _, numbers, _ in lines)
    figure.update_xaxes(title="layer", **({"dtick": 1} if most <= 16 else {}))
    figure.update_yaxes(title=title, tickformat=PERCENT, rangemode="tozero")
    return laid_out(figure, 340 + 20 * len(lines)).update_layout(showlegend=True)


def scale_figure(histograms: Sequence[ScaleHistogram]) -> Any:
    """Share of the output channels of a role by their scale."""
    figure = go.Figure()
    for index, histogram in enumerate(histograms):
        edges = [2 ** (histogram.first + step / BINS_PER_OCTAVE) for step in range(len(histogram.counts) + 1)]
        figure.add_scatter(
            # Each count is drawn from its lower edge to the next; zeros at both ends close the outline.
            x=[edges[0], *edges],
            y=[0.0, *(count / histogram.channels for count in histogram.counts), 0.0],
            customdata=[0, *histogram.counts, 0],
            name=f"{histogram.role} ({scheme_label(histogram.scheme)})",
            mode="lines",
            line={"shape": "hv", "width": 1.5, "color": COLOURS[index % len(COLOURS)]},
            hovertemplate="scale from %{x:.3g}: %{y:.2%} of channels (%{customdata:,})",
        )
    figure.update_xaxes(title="scale", type="log", exponentformat="power")
    figure.update_yaxes(title="share of channels", tickformat=PERCENT, rangemode="tozero")
    return laid_out(figure, 360 + 12 * len(histograms))


def _parts(linears: Sequence[LinearFacts], error_of: ErrorOf) -> str:
    return ", ".join(f"{linear.projection.removesuffix('_proj')} {error(error_of(linear))}" for linear in linears)


def _small_together(roles: Sequence[RoleFacts]) -> list[RoleFacts]:
    total = sum(role.output_bytes for role in roles)
    small = [role for role in roles if max(role.source_bytes or 0, role.output_bytes) < _SMALL * total]
    if len(small) < 2:
        return list(roles)
    rest = RoleFacts(
        role=f"{len(small)} smaller ones",
        scheme="",
        tensors=sum(role.tensors for role in small),
        parameters=sum(role.parameters for role in small),
        source_bytes=None
        if any(role.source_bytes is None for role in small)
        else sum(role.source_bytes or 0 for role in small),
        output_bytes=sum(role.output_bytes for role in small),
        relative_error=None,
    )
    return [*(role for role in roles if role not in small), rest]


def _unit(largest: int) -> tuple[str, int]:
    return ("GB", 10**9) if largest >= 10**9 else ("MB", 10**6) if largest >= 10**6 else ("kB", 10**3)
