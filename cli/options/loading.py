"""The options of commands that load a model: its backend, its dtypes and its cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from ...choices import BACKENDS, COMPUTE_DTYPES, KV_CACHE_DTYPES
from ..terminal.console import size

_F = TypeVar("_F", bound=Callable[..., Any])

LOADING: Final = ("backend", "device", "dtype", "kv_cache_dtype", "cache_size")
"""The parameters that `loading_options` adds."""


def loading_options(function: _F) -> _F:
    """Add the options to a command; they arrive under the names of LOADING."""
    options = [
        click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True),
        click.option("--device", help="Which NPU the ascend backend runs on, like npu:1."),
        click.option("--dtype", type=click.Choice(COMPUTE_DTYPES), help="Compute dtype; default: the backend's own."),
        click.option(
            "--kv-cache-dtype",
            type=click.Choice(KV_CACHE_DTYPES),
            default="auto",
            show_default=True,
            help="int8: a smaller cache, for artifacts that were calibrated.",
        ),
        click.option("--cache-size", type=size, default="2GiB", show_default=True, help="Memory for the KV cache."),
    ]
    for option in reversed(options):
        function = option(function)
    return function
