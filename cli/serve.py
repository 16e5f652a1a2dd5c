"""`npuq serve`: a model behind OpenAI's HTTP protocol."""

from __future__ import annotations

import ipaddress
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import click

from ..choices import REASONING_FORMATS, TOOL_FORMATS
from ..errors import NpuqError, NpuqWarning
from ..inputs.files import read_given_text
from .options.loading import loading_options
from .options.reading import as_option, known_type
from .ranks import parallel_option, ranks_of_command
from .terminal.console import emit_json, format_bytes, json_option, say, size


class ServeError(NpuqError):
    """A server that cannot start."""


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; any other needs a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option("--served-name", metavar="NAME", help="The model's name for clients. [default: its directory's]")
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with a key a line, one of which clients have to send; or one key in $NPUQ_API_KEY.",
)
@click.option("--no-auth", is_flag=True, help="Serve other machines without a key.")
@click.option("--open-metrics", is_flag=True, help="Let /metrics be read without a key.")
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Another name of this machine in clients' URLs; may be repeated.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="URL",
    help="Let web pages of this origin call the server; may be repeated.",
)
@click.option("--max-queue", type=click.IntRange(min=1), default=64, show_default=True, help="Requests at once.")
@click.option(
    "--max-queued-tokens",
    type=click.IntRange(min=1),
    default=1 << 18,
    show_default=True,
    help="Prompt tokens that wait.",
)
@click.option("--max-seqs", type=click.IntRange(min=1), default=32, show_default=True, help="Texts in one step.")
@click.option("--max-choices", type=click.IntRange(min=1), default=16, show_default=True, help="n of a request.")
@click.option("--max-body", type=size, default="8MiB", show_default=True, help="Size of a request.")
@click.option(
    "--step-ms",
    type=click.IntRange(min=1),
    default=250,
    show_default=True,
    help="Time that prompts may take of a step: so long others wait for their next token.",
)
@click.option(
    "--request-timeout",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Seconds for an answer; 0: any.",
)
@click.option(
    "--shutdown-timeout",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds that running answers have after SIGTERM or Ctrl-C; a second one ends at once.",
)
@click.option(
    "--chat-template",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with the chat template, instead of the model's own.",
)
@click.option(
    "--reasoning",
    type=click.Choice(REASONING_FORMATS),
    default="auto",
    show_default=True,
    help="How the model marks its reasoning; auto: as its chat template says; none: it stays in the text.",
)
@click.option(
    "--tools",
    type=click.Choice(TOOL_FORMATS),
    default="auto",
    show_default=True,
    help="How the model writes tool calls; auto: as its chat template says.",
)
@click.option("--no-prefix-cache", is_flag=True, help="Do not keep what prompts have in common.")
@click.option("--no-page", is_flag=True, help="No chat page at /.")
@click.option("--log-prompts", is_flag=True, help="Log the text of prompts, not only their length.")
@as_option("MODEL")
@loading_options
@click.option("--eager", is_flag=True, help="On an NPU: launch every operator, replay no captured decode steps.")
@parallel_option
@click.option("--quiet", is_flag=True, help="No line a request, and no notes.")
@json_option("A JSON object with the server's URL when it listens.")
def command(
    model: Path,
    host: str,
    port: int,
    served_name: str | None,
    api_key_file: Path | None,
    no_auth: bool,
    open_metrics: bool,
    allowed_hosts: tuple[str, ...],
    cors_origins: tuple[str, ...],
    max_queue: int,
    max_queued_tokens: int,
    max_seqs: int,
    max_choices: int,
    max_body: int,
    step_ms: int,
    request_timeout: float,
    shutdown_timeout: float,
    chat_template: Path | None,
    reasoning: str,
    tools: str,
    no_prefix_cache: bool,
    no_page: bool,
    log_prompts: bool,
    family: str | None,
    backend: str,
    device: str | None,
    dtype: str | None,
    kv_cache_dtype: str,
    cache_size: int | None,
    eager: bool,
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
        from ..serve.http.access import Access, loopback_hosts
        from ..serve.limits import Limits
        from ..serve.memory import freeze_objects
        from ..serve.server import HttpServer, bind
        from ..serve.service import Service
    except ModuleNotFoundError as error:
        raise ServeError(f"the server needs {error.name}: pip install 'npuq[serve]'") from error

    ranks = ranks_of_command()
    keys = _keys(api_key_file)
    local = _is_loopback(host)
    if not (local or keys or no_auth):
        raise click.UsageError(
            f"--host {host} lets other machines in: give a key (--api-key-file or $NPUQ_API_KEY), or --no-auth"
        )
    if quiet:
        warnings.simplefilter("ignore", NpuqWarning)

    import torch

    from ..runtime import EngineConfig, Tokenizer, load
    from ..runtime.text.generation_config import default_sampling, read_generation_config
    from ..runtime.text.replies.formats import find_format
    from ..runtime.text.tokenizer_check import require_tokenizer
    from .transfer import local_model

    def suitable(found: Path) -> None:
        known_type(family)(found)
        require_tokenizer(found)

    sizes = EngineConfig(
        cache_size,
        max_num_seqs=max_seqs,
        max_num_batched_tokens=max(EngineConfig.max_num_batched_tokens, 2 * max_seqs),
        step_seconds=step_ms / 1000,
        prefix_cache=not no_prefix_cache,
    )
    ranks.join()
    ranks.serve()
    directory = ranks.fetch(lambda silent: local_model(model, quiet=quiet or silent, before_weights=suitable))
    params = default_sampling(directory, read_generation_config(directory), temperature=1.0)
    tokenizer = Tokenizer(directory, chat_template)
    reply_format = find_format(tokenizer, reasoning, tools)
    # Before the weights are read: a port that is taken is known at once.
    listener = _bound(bind, host, port) if ranks.leads else None
    runner = load(
        directory,
        backend,
        None if dtype is None else getattr(torch, dtype),
        device,
        engine=sizes,
        kv_cache_dtype=kv_cache_dtype,
        tokenizer=tokenizer,
        family=family,
        graphs=not eager,
        parallel=ranks.layout(parallel),
    )
    if listener is None:
        runner.follow()
        return

    names = [name for name in (served_name, directory.resolve().name) if name is not None]
    number = listener.getsockname()[1]
    url = f"http://{f'[{host}]' if ':' in host else host}:{number}/v1"
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
                + ("" if no_page else f", with a page at {url.removesuffix('/v1')}/")
            )
            held = format_bytes(runner.cache_bytes)
            say(f"npuq: {runner.context} tokens of context, a KV cache of {runner.cache_tokens} tokens ({held})")

        if not (quiet or tokenizer.has_chat_template):
            say("npuq: the model has no chat template, so chat is refused; --chat-template FILE gives one")

    def drains(running: int) -> None:
        if not quiet:
            say(f"npuq: ends after {running} running answers, or {shutdown_timeout:g} s; once more ends at once")

    service = Service(
        runner,
        names,
        params,
        Limits(
            max_body=max_body,
            max_queue=max_queue,
            max_queued_tokens=max_queued_tokens,
            max_choices=max_choices,
            request_seconds=request_timeout,
        ),
        Access.of(
            keys,
            hosts=(*(loopback_hosts() if local else ()), *allowed_hosts),
            origins=cors_origins,
            open_metrics=open_metrics,
        ),
        log=_nowhere if quiet else say,
        log_prompts=log_prompts,
        failed=failed,
        reply_format=reply_format,
        has_page=not no_page,
    )
    server = HttpServer(service, shutdown_timeout, listening, drains)
    ranks.last_words = server.last_words
    freeze_objects()
    server.run(sockets=[listener])
    if failures:
        raise failures[0]
    runner.close()


def _keys(path: Path | None) -> list[str]:
    """The keys of the option, else that of the environment. Raises UsageError for one that no client can send."""
    given = os.environ.get("NPUQ_API_KEY", "") if path is None else read_given_text(path, ServeError)
    keys = [line.strip() for line in given.splitlines() if line.strip()]
    if path is not None and not keys:
        raise click.UsageError(f"{path}: holds no key")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise click.UsageError(f"{path or '$NPUQ_API_KEY'}: a key is of printable ASCII characters, without spaces")
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bound(bind: Any, host: str, port: int) -> socket.socket:
    try:
        found: socket.socket = bind(host, port)
    except OSError as error:
        raise ServeError(f"--host {host} --port {port}: {error.strerror or error}") from error
    return found


def _nowhere(line: str) -> None:
    """Log nothing."""
