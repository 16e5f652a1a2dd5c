"""The child process of `template.py`: renders Jinja templates from outside, confined.

It imports the standard library and jinja2 only, then confines itself (`confinement.py`). No descriptor can be opened
any more, so that jinja2's late imports come before. An alarm ends the process if its parent was killed.
Messages on both pipes are a line `KIND LENGTH` and as many bytes.

    R   ready, sent once
    T   the rendered text
    E   the template failed; the payload is the reason
    L   a limit was reached; the payload names it. The process ends.
"""

from __future__ import annotations

import codecs
import json
import signal
import sys
from datetime import datetime
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NoReturn


def main(arguments: list[str]) -> None:
    """Serve requests from standard input until it ends: JSON objects of `template` and `values`.

    arguments: seconds until the alarm, bytes of memory beyond those at the start, characters of a text, and the folders
    of jinja2 and its imports.
    """
    seconds, memory, characters = int(arguments[0]), int(arguments[1]), int(arguments[2])
    sys.path.extend([*arguments[3:], str(Path(__file__).parent)])
    from confinement import confine  # type: ignore[import-not-found]  # this runs as a script of its own

    # The alarm must end the process within a long operation in C too: the default action, not a handler.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    compiled = lru_cache(maxsize=4)(_environment().from_string)
    confine(memory)
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    send(replies, "R", b"")
    while line := requests.readline(64):
        request = json.loads(requests.read(int(line)))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        kind, text = answer(compiled, request, characters)
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(replies, kind, text)
        if kind == "L":
            return


def answer(compiled: Any, request: dict[str, Any], characters: int) -> tuple[str, bytes]:
    """Render a request: the kind of the reply and its payload."""
    try:
        template = compiled(request["template"])
        parts: list[str] = []
        for part in template.generate(request["values"]):
            characters -= len(part)
            if characters < 0:
                return "L", b"it writes too much text"
            parts.append(part)
        return "T", "".join(parts).encode("utf-8")
    except MemoryError:
        return "L", b"it needs too much memory"
    except RecursionError:
        return "L", b"it is nested too deeply"
    except UnicodeEncodeError:
        return "E", b"it writes a lone surrogate, which no tokenizer takes"
    except Exception as error:  # templates are programs: anything may go wrong in them
        line = getattr(error, "lineno", None)
        reason = str(error)[:500] or type(error).__name__
        return "E", f"{reason}{f' (line {line})' if line else ''}".encode(errors="backslashreplace")


def send(replies: BinaryIO, kind: str, payload: bytes) -> None:
    replies.write(f"{kind} {len(payload)}\n".encode() + payload)
    replies.flush()


def _environment() -> Any:
    """The templates' environment, that of transformers' renderer (utils/chat_template_utils.py, 5.24)."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` marks the assistant's text, for training. It has a scope."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it for each object)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("generated"), [], [], body).set_lineno(line)

        def generated(self, caller: Any) -> Any:
            return caller()

    # The late imports of jinja2, markupsafe and string literals.
    for late in ("html", "jinja2.constants", "jinja2.debug", "pprint", "textwrap"):
        import_module(late)
    for encoding in ("ascii", "latin-1", "unicode-escape", "utf-8"):
        codecs.lookup(encoding)

    def check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace keeps no attribute with an underscore in front, such as {name!r}")

    class GuardedNamespace(Namespace):
        """A namespace without underscored names, which reach Python's internals."""

        def __init__(*args: Any, **attributes: Any) -> None:
            # Without a parameter `self`, so that a template may set an attribute of that name.
            self, *given = args
            values = dict(*given, **attributes)
            for name in values:
                check(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    class DictMaker:
        """`dict(…)` and `dict.fromkeys(…)` without access to the type."""

        def __call__(self, *given: Any, **values: Any) -> dict[Any, Any]:
            return dict(*given, **values)

        def fromkeys(self, *given: Any) -> dict[Any, Any]:
            return dict.fromkeys(*given)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter would escape for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=DictMaker(), namespace=GuardedNamespace
    )
    return environment


if __name__ == "__main__":
    main(sys.argv[1:])
