"""`npuq serve`: a model behind OpenAI's HTTP protocol."""

from __future__ import annotations

from pathlib import Path

import click

from ..choices import BACKENDS, COMPUTE_DTYPES, KV_CACHE_DTYPES
from ..errors import NpuqError
from .options.reading import as_option, known_type
from .terminal.console import say, size


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option("--served-name", metavar="NAME", help="The model's name for clients; default: its directory's.")
@as_option("MODEL")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True)
@click.option("--device", help="Which NPU the ascend backend runs on, like npu:1.")
@click.option("--dtype", type=click.Choice(COMPUTE_DTYPES), help="Compute dtype; default: the backend's own.")
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(KV_CACHE_DTYPES),
    default="auto",
    show_default=True,
    help="int8: a smaller cache, for artifacts that were calibrated.",
)
@click.option("--cache-size", type=size, default="2GiB", show_default=True, help="Memory for the KV cache.")
def command(
    model: Path,
    host: str,
    port: int,
    served_name: str | None,
    family: str | None,
    backend: str,
    device: str | None,
    dtype: str | None,
    kv_cache_dtype: str,
    cache_size: int,
) -> None:
    """Serve MODEL, a quantized artifact or an unquantized checkpoint, to clients of OpenAI's HTTP protocol."""
    try:
        from ..serve.server import bind, make_server
        from ..serve.service import Service
    except ModuleNotFoundError as error:
        raise NpuqError(f"npuq serve needs {error.name}: pip install 'npuq[serve]'") from error

    import torch

    from ..runtime import EngineConfig, Tokenizer, load
    from ..runtime.text.generation_config import default_sampling, read_generation_config
    from ..runtime.text.tokenizer_check import require_tokenizer
    from .transfer import local_model

    def suitable(found: Path) -> None:
        known_type(family)(found)
        require_tokenizer(found)

    directory = local_model(model, quiet=False, before_weights=suitable)
    params = default_sampling(directory, read_generation_config(directory), temperature=1.0)
    listener = bind(host, port)  # before the weights are read: a port that is taken is known at once
    runner = load(
        directory,
        backend,
        None if dtype is None else getattr(torch, dtype),
        device,
        engine=EngineConfig(cache_size, step_seconds=0.25),
        kv_cache_dtype=kv_cache_dtype,
        tokenizer=Tokenizer(directory),
        family=family,
    )
    names = [name for name in (served_name, directory.resolve().name) if name is not None]
    address = listener.getsockname()
    say(f"serving {names[0]} at http://{host}:{address[1]}/v1")
    make_server(Service(runner, names, params)).run(sockets=[listener])
