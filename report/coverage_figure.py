"""How well calibration reached the experts, drawn."""

from __future__ import annotations

from math import log10
from typing import Any

from .calibration import FALLBACKS, Coverage
from .heat_map import heat_map
from .style import MARK

_MARKS = {"blended": "circle", "pooled": "diamond", "data-free": "x"}


def coverage_figure(coverage: Coverage) -> Any:
    """Tokens routed to each expert, on a logarithmic scale, and a mark on those that had too few."""
    layers = [layer for layer in coverage.layers if layer.expert_tokens]
    rows = [str(layer.layer) for layer in layers]
    most = max(max(layer.expert_tokens) for layer in layers)
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
    powers = list(range(int(log10(max(most, 1))) + 1))
    bar = {"tickvals": powers, "ticktext": [f"{10**power:,}" for power in powers], "tickformat": None}
    figure.update_traces(colorbar=bar, zmin=0.0, zmax=log10(max(most, 10)), hoverongaps=True)
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
    # Below the axis: above it stands the colour bar.
    legend = {"yref": "container", "y": 0.0, "yanchor": "bottom", "x": 1.0, "xanchor": "right"}
    return figure.update_layout(legend=legend, margin_b=64, height=figure.layout.height + 30)


def _text(count: int, fallback: str | None) -> str:
    return f"{count:,} tokens" + (f", {fallback}" if fallback else "")
