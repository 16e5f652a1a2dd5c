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


backend_option: Final = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="What computes: NPUs, native kernels on the CPU, or plain torch. auto: an NPU where there is one.",
)


def _cache_size(text: str | None) -> int | None:
    """A click parameter type: a size, or None for "auto"."""
    return None if text is None or text == "auto" else size(text)


def loading_options(function: _F) -> _F:
    """Add the options to a command; they arrive under the names of LOADING."""
    options = [
        backend_option,
        click.option("--device", help="Which NPU the ascend backend runs on, like npu:1."),
        click.option("--dtype", type=click.Choice(COMPUTE_DTYPES), help="Compute dtype. [default: the backend's own]"),
        click.option(
            "--kv-cache-dtype",
            type=click.Choice(KV_CACHE_DTYPES),
            default="auto",
            show_default=True,
            help="int8: a smaller cache, for artifacts that were calibrated.",
        ),
        click.option(
            "--cache-size",
            type=_cache_size,
            default="auto",
            show_default=True,
            metavar="SIZE|auto",
            help="Memory for the KV cache. auto: what is left on an NPU, up to 2 GiB on the CPU.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function
