"""The sampling options of a command, and notes on those in effect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ...runtime import SamplingParams

_F = TypeVar("_F", bound=Callable[..., Any])

# Fields without effect in greedy sampling.
_ONLY_SAMPLED = ("top_k", "top_p", "min_p", "seed")


def sampling_options(max_new_tokens: int | None) -> Callable[[_F], _F]:
    """Add the sampling options to a command; an option that the user does not give arrives as None.

    max_new_tokens: default of that option; None: as many as the context has room for.
    """
    options = [
        click.option(
            "--max-new-tokens",
            type=click.IntRange(min=1),
            default=max_new_tokens,
            show_default=max_new_tokens is not None or "what the context leaves",
            help="The longest completion.",
        ),
        click.option("--greedy", is_flag=True, help="Take the likeliest token, as --temperature 0."),
        click.option("--temperature", type=click.FloatRange(min=0), help="0 takes the likeliest token."),
        click.option("--top-k", type=click.IntRange(min=0), help="Keep the K likeliest tokens; 0: all."),
        click.option(
            "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Keep the likeliest tokens that sum to P."
        ),
        click.option("--min-p", type=click.FloatRange(0, 1), help="Keep tokens at least P times the likeliest."),
        click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True), help="1: none."),
        click.option("--presence-penalty", type=click.FloatRange(-2, 2), help="Of tokens in the completion; 0: none."),
        click.option("--frequency-penalty", type=click.FloatRange(-2, 2), help="The same for each time; 0: none."),
        click.option("--min-tokens", type=click.IntRange(min=0), help="No end before so many tokens."),
        click.option(
            "--seed",
            type=click.IntRange(-(2**63), 2**63 - 1),
            help="Makes sampling repeatable, whatever else runs beside it.",
        ),
    ]

    def add(function: _F) -> _F:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def given_options(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of SamplingParams for the options given by the user."""
    given = {name: value for name, value in sampling.items() if name != "greedy" and value is not None}
    if sampling["greedy"]:
        if given.get("temperature"):
            raise click.UsageError("--greedy and --temperature above 0 contradict each other; leave one out")
        given["temperature"] = 0.0
    return given


def notes(params: SamplingParams, defaults: SamplingParams, given: Mapping[str, Any]) -> list[str]:
    """Lines on the sampling in effect: its values, their origin, and options without effect."""
    off = type(params)()
    names = ["temperature", *_ONLY_SAMPLED] if params.temperature else []
    names += ["repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens"]
    in_force = [name for name in names if getattr(params, name) != getattr(off, name)]
    words = [f"{_option(name)} {getattr(params, name)}" for name in in_force]
    if params.temperature == 0:
        words.insert(0, "greedy")
    of_file = [name for name in in_force if name not in given and getattr(defaults, name) != getattr(off, name)]
    line = "sampling: " + ", ".join(words)
    if of_file:
        which = "" if len(of_file) == len(in_force) else f"{', '.join(map(_option, of_file))} "
        line += f" ({which}from generation_config.json)"
    lines = [line]
    idle = [f"--{_option(name)}" for name in _ONLY_SAMPLED if name in given]
    if params.temperature == 0 and idle:
        lines.append(f"{', '.join(idle)}: without effect, because sampling is greedy")
    return lines


def _option(name: str) -> str:
    return name.replace("_", "-")
