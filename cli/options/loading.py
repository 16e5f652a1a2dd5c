"""The options of commands that load a model to run it, and what they load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from ...choices import BACKENDS, COMPUTE_DTYPES, KV_CACHE_DTYPES
from ..terminal.console import size
from .gathering import gathered
from .reading import as_option, known_type

if TYPE_CHECKING:
    from ...runtime import EngineConfig, LanguageModel, Tokenizer

_F = TypeVar("_F", bound=Callable[..., Any])

backend_option: Final = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="What computes: NPUs, native kernels on the CPU, or plain torch. auto: an NPU where there is one.",
)


@dataclass(frozen=True)
class Loading:
    """Values of the options. cache_size: bytes of the KV cache; None: what is free."""

    family: str | None
    backend: str
    device: str | None
    dtype: str | None
    kv_cache_dtype: str
    cache_size: int | None
    eager: bool

    def find(self, model: Path, *, quiet: bool) -> Path:
        """The directory of a MODEL argument. A repository is refused before its weights are fetched."""
        from ...runtime.text.tokenizer_check import require_tokenizer
        from ..transfer import local_model

        def suitable(found: Path) -> None:
            known_type(self.family)(found)
            require_tokenizer(found)

        return local_model(model, quiet=quiet, before_weights=suitable)

    def load(
        self, directory: Path, tokenizer: Tokenizer, engine: EngineConfig, parallel: str | None = None
    ) -> LanguageModel:
        """The model of a directory. parallel: how ranks divide it."""
        import torch

        from ...runtime import load

        return load(
            directory,
            self.backend,
            None if self.dtype is None else getattr(torch, self.dtype),
            self.device,
            engine=engine,
            kv_cache_dtype=self.kv_cache_dtype,
            tokenizer=tokenizer,
            family=self.family,
            graphs=not self.eager,
            parallel=parallel,
        )


LOADING: Final = tuple(field.name for field in fields(Loading))
"""The parameters that `loading_options` adds."""


def _cache_size(text: str | None) -> int | None:
    """A click parameter type: a size, or None for "auto"."""
    return None if text is None or text == "auto" else size(text)


def loading_options(function: _F) -> _F:
    """Add the options to a command; they arrive as `loading`."""
    options = [
        as_option("MODEL"),
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
        click.option(
            "--eager", is_flag=True, help="On an NPU: launch every operator, replay no captured decode steps."
        ),
    ]
    return gathered("loading", Loading, options)(function)
