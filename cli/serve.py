"""`npuq serve`: a model behind OpenAI's HTTP protocol."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path
from typing import Any

import click

from ..errors import NpuqWarning
from .options.loading import Loading, loading_options
from .options.serving import ServeError, Serving, serving_options
from .ranks import parallel_option, ranks_of_command
from .terminal.console import emit_json, format_bytes, json_option, say


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@serving_options
@loading_options
@parallel_option
@click.option("--quiet", is_flag=True, help="No line a request, and no notes.")
@json_option("A JSON object with the server's URL when it listens.")
def command(
    model: Path,
    serving: Serving,
    loading: Loading,
    parallel: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Serve MODEL, a quantized artifact or an unquantized checkpoint, to clients of OpenAI's HTTP protocol.

    The model is a directory, or user/repo. Clients take http://HOST:PORT/v1 as their base URL. The server listens on
    this machine alone unless --host says otherwise, and answers no other web page. SIGTERM lets running answers end.

    Over several devices or processes: torchrun --nproc-per-node N -m npuq serve MODEL …
    """
    try:
        from ..serve.memory import freeze_objects
        from ..serve.server import HttpServer, bind
        from ..serve.service import Service
    except ModuleNotFoundError as error:
        raise ServeError(f"the server needs {error.name}: pip install 'npuq[serve]'") from error

    ranks = ranks_of_command()
    serving.check()
    if quiet:
        warnings.simplefilter("ignore", NpuqWarning)

    from ..runtime import Tokenizer
    from ..runtime.text.generation_config import default_sampling, read_generation_config
    from ..runtime.text.replies.formats import find_format

    ranks.join()
    ranks.serve()
    directory = ranks.fetch(lambda silent: loading.find(model, quiet=quiet or silent))
    params = default_sampling(directory, read_generation_config(directory), temperature=1.0)
    tokenizer = Tokenizer(directory, serving.chat_template)
    reply_format = find_format(tokenizer, serving.reasoning, serving.tools)
    # Before the weights are read: a port that is taken is known at once.
    listener = _bound(bind, serving.host, serving.port) if ranks.leads else None
    runner = loading.load(directory, tokenizer, serving.engine(loading.cache_size), ranks.layout(parallel))
    if listener is None:
        runner.follow()
        return

    names = [name for name in (serving.served_name, directory.resolve().name) if name is not None]
    number = listener.getsockname()[1]
    url = f"http://{f'[{serving.host}]' if ':' in serving.host else serving.host}:{number}/v1"
    failures: list[BaseException] = []

    def failed(error: BaseException) -> None:
        """Over ranks a step that failed ends all of them: their caches differ."""
        if runner.over_ranks:
            failures.append(error)
            server.should_exit = True

    def listening() -> None:
        if as_json:
            cache = {"cache_tokens": runner.cache_tokens, "cache_bytes": runner.cache_bytes}
            emit_json({"url": url, "models": names, "context": runner.context, **cache, "pid": os.getpid()})
        elif not quiet:
            say(
                f"npuq: serving {names[0]} at {url}"
                + ("" if serving.no_page else f", with a page at {url.removesuffix('/v1')}/")
            )
            held = format_bytes(runner.cache_bytes)
            say(f"npuq: {runner.context} tokens of context, a KV cache of {runner.cache_tokens} tokens ({held})")

        if not (quiet or tokenizer.has_chat_template):
            say("npuq: the model has no chat template, so chat is refused; --chat-template FILE gives one")

    def drains(running: int) -> None:
        if not quiet:
            say(
                f"npuq: ends after {running} running answers, or {serving.shutdown_timeout:g} s; once more ends at once"
            )

    service = Service(
        runner,
        names,
        params,
        serving.limits(),
        serving.access(),
        log=_nowhere if quiet else say,
        log_prompts=serving.log_prompts,
        failed=failed,
        reply_format=reply_format,
        has_page=not serving.no_page,
    )
    server = HttpServer(service, serving.shutdown_timeout, listening, drains)
    ranks.last_words = server.last_words
    freeze_objects()
    server.run(sockets=[listener])
    if failures:
        raise failures[0]
    runner.close()


def _bound(bind: Any, host: str, port: int) -> socket.socket:
    try:
        found: socket.socket = bind(host, port)
    except OSError as error:
        raise ServeError(f"--host {host} --port {port}: {error.strerror or error}") from error
    return found


def _nowhere(line: str) -> None:
    """Log nothing."""
