"""Numbers as a reader likes them."""

from __future__ import annotations


def error(value: float | None) -> str:
    """A relative error in percent with two significant digits at least; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.2%}" if value >= 0.01 or value == 0 else f"{value:.3%}"


def number(value: int) -> str:
    """With thousands separated."""
    return f"{value:,}"
