"""The options of a server: who may call it, what it refuses, and how it talks."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ...choices import REASONING_FORMATS, TOOL_FORMATS
from ...errors import NpuqError
from ...inputs.files import read_given_text
from ..terminal.console import size
from .gathering import gathered

if TYPE_CHECKING:
    from ...runtime import EngineConfig
    from ...serve.http.access import Access
    from ...serve.limits import Limits

_F = TypeVar("_F", bound=Callable[..., Any])


class ServeError(NpuqError):
    """A server that cannot start."""


@dataclass
class Serving:
    """Values of the options."""

    host: str
    port: int
    served_name: str | None
    api_key_file: Path | None
    no_auth: bool
    open_metrics: bool
    allowed_hosts: tuple[str, ...]
    cors_origins: tuple[str, ...]
    max_queue: int
    max_queued_tokens: int
    max_seqs: int
    max_choices: int
    max_body: int
    step_ms: int
    request_timeout: float
    shutdown_timeout: float
    chat_template: Path | None
    reasoning: str
    tools: str
    no_prefix_cache: bool
    no_page: bool
    log_prompts: bool

    @cached_property
    def keys(self) -> list[str]:
        """The keys of the option, else that of the environment. Raises UsageError for one that no client can send."""
        path = self.api_key_file
        given = os.environ.get("NPUQ_API_KEY", "") if path is None else read_given_text(path, ServeError)
        keys = [line.strip() for line in given.splitlines() if line.strip()]
        if path is not None and not keys:
            raise click.UsageError(f"{path}: holds no key")
        if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
            raise click.UsageError(f"{path or '$NPUQ_API_KEY'}: a key is of printable ASCII characters, without spaces")
        return keys

    @property
    def is_local(self) -> bool:
        """True if the server listens to its own machine alone."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def check(self) -> None:
        """Raise UsageError for wrong keys, and for a server that lets anybody in where nobody asked for that."""
        keys = self.keys  # wrong ones are refused in any case
        if not (self.is_local or keys or self.no_auth):
            raise click.UsageError(
                f"--host {self.host} lets other machines in: give a key (--api-key-file or $NPUQ_API_KEY), or --no-auth"
            )

    def access(self) -> Access:
        from ...serve.http.access import Access, loopback_hosts

        hosts = (*(loopback_hosts() if self.is_local else ()), *self.allowed_hosts)
        return Access.of(self.keys, hosts, self.cors_origins, open_metrics=self.open_metrics)

    def limits(self) -> Limits:
        from ...serve.limits import Limits

        return Limits(
            max_body=self.max_body,
            max_queue=self.max_queue,
            max_queued_tokens=self.max_queued_tokens,
            max_choices=self.max_choices,
            request_seconds=self.request_timeout,
        )

    def engine(self, cache_size: int | None) -> EngineConfig:
        from ...runtime import EngineConfig

        return EngineConfig(
            cache_size,
            max_num_seqs=self.max_seqs,
            max_num_batched_tokens=max(EngineConfig.max_num_batched_tokens, 2 * self.max_seqs),
            step_seconds=self.step_ms / 1000,
            prefix_cache=not self.no_prefix_cache,
        )


def serving_options(function: _F) -> _F:
    """Add the options to a command; they arrive as `serving`."""
    options = [
        click.option(
            "--host", default="127.0.0.1", show_default=True, help="Address to listen at; any other needs a key."
        ),
        click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one."),
        click.option("--served-name", metavar="NAME", help="The model's name for clients. [default: its directory's]"),
        click.option(
            "--api-key-file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="A file with a key a line, one of which clients have to send; or one key in $NPUQ_API_KEY.",
        ),
        click.option("--no-auth", is_flag=True, help="Serve other machines without a key."),
        click.option("--open-metrics", is_flag=True, help="Let /metrics be read without a key."),
        click.option(
            "--allowed-host",
            "allowed_hosts",
            multiple=True,
            metavar="NAME",
            help="Another name of this machine in clients' URLs; may be repeated.",
        ),
        click.option(
            "--cors-origin",
            "cors_origins",
            multiple=True,
            metavar="URL",
            help="Let web pages of this origin call the server; may be repeated.",
        ),
        click.option(
            "--max-queue", type=click.IntRange(min=1), default=64, show_default=True, help="Requests at once."
        ),
        click.option(
            "--max-queued-tokens",
            type=click.IntRange(min=1),
            default=1 << 18,
            show_default=True,
            help="Prompt tokens that wait.",
        ),
        click.option(
            "--max-seqs", type=click.IntRange(min=1), default=32, show_default=True, help="Texts in one step."
        ),
        click.option(
            "--max-choices", type=click.IntRange(min=1), default=16, show_default=True, help="n of a request."
        ),
        click.option("--max-body", type=size, default="8MiB", show_default=True, help="Size of a request."),
        click.option(
            "--step-ms",
            type=click.IntRange(min=1),
            default=250,
            show_default=True,
            help="Time that prompts may take of a step: so long others wait for their next token.",
        ),
        click.option(
            "--request-timeout",
            type=click.FloatRange(min=0),
            default=0.0,
            show_default=True,
            help="Seconds for an answer; 0: any.",
        ),
        click.option(
            "--shutdown-timeout",
            type=click.FloatRange(min=0),
            default=30.0,
            show_default=True,
            help="Seconds that running answers have after SIGTERM or Ctrl-C; a second one ends at once.",
        ),
        click.option(
            "--chat-template",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="A file with the chat template, instead of the model's own.",
        ),
        click.option(
            "--reasoning",
            type=click.Choice(REASONING_FORMATS),
            default="auto",
            show_default=True,
            help="How the model marks its reasoning; auto: as its chat template says; none: it stays in the text.",
        ),
        click.option(
            "--tools",
            type=click.Choice(TOOL_FORMATS),
            default="auto",
            show_default=True,
            help="How the model writes tool calls; auto: as its chat template says.",
        ),
        click.option("--no-prefix-cache", is_flag=True, help="Do not keep what prompts have in common."),
        click.option("--no-page", is_flag=True, help="No chat page at /."),
        click.option("--log-prompts", is_flag=True, help="Log the text of prompts, not only their length."),
    ]
    return gathered("serving", Serving, options)(function)
