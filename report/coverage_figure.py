"""A figure of the tokens with which calibration reached each expert."""

from __future__ import annotations

from math import log10
from typing import Any

from .calibration import FALLBACKS, Coverage
from .heat_map import heat_map
from .style import MARK

_MARKS = {"blended": "circle", "data-free": "x"}


def coverage_figure(coverage: Coverage) -> Any:
    """Tokens routed to each expert, on a logarithmic scale, and a mark on experts with too few."""
    layers = [layer for layer in coverage.layers if layer.expert_tokens]
    rows = [str(layer.layer) for layer in layers]
    figure = heat_map(
        list(range(max(len(layer.expert_tokens) for layer in layers))),
        rows,
        [[log10(count) if count else None for count in layer.expert_tokens] for layer in layers],
        [
            [_text(count, layer.fallbacks.get(expert)) for expert, count in enumerate(layer.expert_tokens)]
            for layer in layers
        ],
        "layer %{y}, expert %{x}: %{text}<extra></extra>",
    ).update_xaxes(title="expert")
    reached = [count for layer in layers for count in layer.expert_tokens if count] or [1]
    ticks = _ticks(min(reached), max(reached))
    figure.update_traces(
        colorbar={"tickvals": [log10(tick) for tick in ticks], "ticktext": [f"{tick:,}" for tick in ticks]},
        zmin=log10(ticks[0]),
        zmax=log10(ticks[-1]),
        hoverongaps=True,
    )
    for kind in FALLBACKS:
        marked = [(row, expert) for row, layer in zip(rows, layers, strict=True)
                  for expert, what in layer.fallbacks.items() if what == kind]  # fmt: skip
        if marked:
            figure.add_scatter(
                x=[expert for _, expert in marked],
                y=[row for row, _ in marked],
                name=f"{kind} ({len(marked)})",
                mode="markers",
                marker={"symbol": _MARKS[kind], "size": 8, "color": "white", "line": {"width": 1.5, "color": MARK}},
                hoverinfo="skip",
                showlegend=True,
            )
    if not any(layer.fallbacks for layer in layers):
        return figure
    # Below the axis: the colour bar is above it.
    legend = {"yref": "container", "y": 0.0, "yanchor": "bottom", "x": 1.0, "xanchor": "right"}
    return figure.update_layout(legend=legend, margin_b=64, height=figure.layout.height + 30)


def _ticks(low: int, high: int) -> list[int]:
    """Round counts, at least two; the first is at most `low` and the last at least `high`."""
    steps = (1,) if high >= 100 * low else (1, 2, 5)
    rounded = [step * 10**power for power in range(len(str(high)) + 1) for step in steps]
    first = max(index for index, tick in enumerate(rounded) if tick <= low)
    last = min(index for index, tick in enumerate(rounded) if tick >= high)
    return rounded[first : max(last, first + 1) + 1]


def _text(count: int, fallback: str | None) -> str:
    return f"{count:,} tokens" + (f", {fallback}" if fallback else "")
