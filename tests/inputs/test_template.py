"""Templates that would run for hours, fill memory or abort end in one line, and their process leaves nothing behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from npuq.errors import GenerationError
from npuq.inputs.template import TemplateRenderer

GREETING = "Hello {{ name }}"


@pytest.fixture
def renderer() -> Iterator[TemplateRenderer]:
    made = TemplateRenderer(GenerationError, seconds=1)
    yield made
    made.close()


def render(renderer: TemplateRenderer, template: str, **values: Any) -> str:
    return renderer.render(template, values, "model/chat_template.jinja")


def process(renderer: TemplateRenderer) -> int:
    assert renderer._process is not None
    return renderer._process.pid


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


BOMBS = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "more than 1 seconds",
    "{{ lipsum(n=10000000) }}": "more than 1 seconds|too much memory",
    "{{ 'x' | center(5000000000) }}": "too much memory",
    "{{ 'x'.ljust(5000000000) }}": "too much memory",
    "{{ '%0999999999d' % 1 }}": "too much memory",
    "{{ ([1] * 100000000) | length }}": "too much memory",
    "{{ 2 ** 10000000000 }}": "more than 1 seconds|too much memory",
    "{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}": "too much text",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}": "nested too deeply",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "nested too deeply",
    "{{ " + "-" * 100000 + "1 }}": "nested too deeply|ended with",
    "{% if x %}" * 300 + "{% endif %}" * 300: "nested too deeply",
}


@pytest.mark.parametrize("template", BOMBS)
def test_bombs_end_in_one_line(renderer: TemplateRenderer, template: str) -> None:
    started = time.monotonic()
    with pytest.raises(GenerationError, match=BOMBS[template]) as caught:
        render(renderer, template)
    assert time.monotonic() - started < 20
    assert str(caught.value).startswith("model/chat_template.jinja: the chat template failed: ")
    assert "\n" not in str(caught.value)
    assert render(renderer, GREETING, name="again") == "Hello again"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for", r"unexpected 'end of template' \(line 1\)"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ raise_exception('no\x1b[31m\n way \u202e') }}", r"no\\x1b\[31m way \\u202e"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include '/etc/passwd' %}", "failed"),
        ("{{ '\\ud800' }}", "lone surrogate"),
        ("{% set ns = namespace(_x=1) %}", "underscore"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "underscore"),
        ("{{ 'x'.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    ],
)
def test_failures_are_one_printable_line(renderer: TemplateRenderer, template: str, expected: str) -> None:
    render(renderer, GREETING, name="first")
    pid = process(renderer)
    with pytest.raises(GenerationError, match=expected) as caught:
        render(renderer, template, messages=[])
    assert str(caught.value).isprintable()
    assert process(renderer) == pid  # a template that fails is no reason to begin anew


def test_every_filter_works_without_files(renderer: TemplateRenderer) -> None:
    """The process opens no file once it renders: what jinja2 imports late must have been imported before."""
    template = (
        "{{ 'a b c' | wordwrap(2) | indent | title }}{{ [1] | pprint }}{{ lipsum(n=1) | length > 10 }}"
        "{{ [3, 1] | sort | random | string | length }}{{ 'http://x.y' | urlize }}{{ {'a': 1} | xmlattr }}"
        "{{ '<p>é</p>' | striptags | urlencode }}{{ 1234567 | filesizeformat }}{{ 'é\\u00e9\\x41' }}{{ 'x' | e }}"
        "{{ strftime_now('%A %B %j %Z') | length > 5 }}{{ [{'a': 1}] | groupby('a') | list }}{{ '%s' | format(1) }}"
        "{{ 'a' | truncate(9) | center(3) }}{{ [1, 2] | batch(1) | list }}{{ 3.14159 | round(2) }}"
    )
    assert "3.14" in render(renderer, template)


def test_the_process_has_nothing_of_ours(renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tokens in its environment, no file that it could open or write, no core."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    render(renderer, GREETING, name="x")
    pid = process(renderer)
    assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()
    limits = {line[:25].strip(): line[26:].split()[0] for line in Path(f"/proc/{pid}/limits").read_text().splitlines()}
    assert limits["Max open files"] == "3"
    assert limits["Max file size"] == limits["Max core file size"] == "0"
    assert int(limits["Max address space"]) < 1 << 30
    assert sorted(path.name for path in Path(f"/proc/{pid}/fd").iterdir()) == ["0", "1", "2"]


def test_one_process_renders_many(renderer: TemplateRenderer) -> None:
    assert renderer._process is None
    pids = set()
    for number in range(20):
        assert render(renderer, f"{number}: {GREETING}", name="x" * number) == f"{number}: Hello {'x' * number}"
        pids.add(process(renderer))
    assert len(pids) == 1


def test_large_conversations_pass(renderer: TemplateRenderer) -> None:
    text = "größer 🐋 " * 200_000
    assert render(TemplateRenderer(GenerationError), GREETING, name=text) == f"Hello {text}"


def test_a_killed_process_is_told_and_replaced(renderer: TemplateRenderer) -> None:
    render(renderer, GREETING, name="x")
    os.kill(process(renderer), signal.SIGKILL)
    with pytest.raises(GenerationError, match="its process ended with signal 9"):
        render(renderer, GREETING, name="x")
    assert render(renderer, GREETING, name="x") == "Hello x"


def test_the_process_ends_with_its_renderer() -> None:
    renderer = TemplateRenderer(GenerationError)
    render(renderer, GREETING, name="x")
    pid = process(renderer)
    assert runs(pid)
    del renderer
    gc.collect()
    assert not runs(pid)


@pytest.mark.parametrize("end", ["pass", "os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_the_process_ends_with_ours(end: str) -> None:
    code = (
        "import os; from npuq.inputs.template import TemplateRenderer; from npuq.errors import GenerationError\n"
        "r = TemplateRenderer(GenerationError); r.render('x', {}, 'y'); print(r._process.pid, flush=True)\n" + end
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    deadline = time.monotonic() + 20
    while runs(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs(int(done.stdout))


def test_an_endless_template_does_not_outlive_a_killed_parent() -> None:
    code = (
        "from npuq.inputs.template import TemplateRenderer; from npuq.errors import GenerationError\n"
        "r = TemplateRenderer(GenerationError, seconds=1); r.render('x', {}, 'y'); print(r._process.pid, flush=True)\n"
        "r.render('{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}', {}, 'y')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert runs(pid)
    deadline = time.monotonic() + 30
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(pid)


def test_threads_get_their_own_texts(renderer: TemplateRenderer) -> None:
    wrong: list[str] = []

    def work(name: str) -> None:
        for number in range(50):
            text = render(renderer, GREETING, name=f"{name}{number}")
            if text != f"Hello {name}{number}":
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_fork_has_a_process_of_its_own(renderer: TemplateRenderer) -> None:
    render(renderer, GREETING, name="x")
    ours = process(renderer)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        text = render(renderer, GREETING, name="child")
        os.write(write, f"{text} {process(renderer)}".encode())
        renderer.close()
        os._exit(0)
    os.waitpid(pid, 0)
    text, _, theirs = os.read(read, 1000).decode().rpartition(" ")
    os.close(read)
    os.close(write)
    assert (text, int(theirs) != ours) == ("Hello child", True)
    assert render(renderer, GREETING, name="parent") == "Hello parent"
    assert process(renderer) == ours


def test_an_interruption_leaves_no_answer_behind(renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    render(renderer, GREETING, name="x")
    exchange = TemplateRenderer._exchange

    def interrupted(self: TemplateRenderer, request: bytes, seconds: float) -> Any:
        exchange(self, request, seconds)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TemplateRenderer, "_exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render(renderer, GREETING, name="before")
    assert render(renderer, GREETING, name="after") == "Hello after"


def test_no_jinja(renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npuq.inputs.template.find_spec", lambda _: None)
    with pytest.raises(GenerationError, match="can be started: jinja2 is not installed"):
        render(renderer, "x")


def _nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"messages": [{"content": b"bytes"}]}, r"messages\[0\]\.content: a bytes is not JSON"),
        ({"tools": [{"f": len}]}, r"tools\[0\]\.f: a builtin_function_or_method is not JSON"),
        ({"a": {1: "x"}}, "a: the key 1 is not text"),
        ({"a": {"x": {1, 2}}}, r"a\.x: a set is not JSON"),
        ({"a": float("nan")}, "nan"),
        ({"a": [float("inf")]}, "inf"),
        ({"a": 10**50}, "40 digits"),
        ({"a": "\ud800"}, "surrogate"),
        ({"a": _nested(100)}, "levels deep"),
        ({"a": LOOP}, "levels deep"),
    ],
)
def test_values_that_are_not_json(renderer: TemplateRenderer, values: dict[str, Any], expected: str) -> None:
    with pytest.raises(GenerationError, match=expected):
        render(renderer, "x", **values)
    assert renderer._process is None


def test_values_arrive_in_jsons_types(renderer: TemplateRenderer) -> None:
    class Text(str):
        pass

    pair = namedtuple("pair", "a b")(1, Text("x"))
    values = {"a": pair, "b": {Text("k"): None}, "c": 1.0, "d": True, "e": -0.5e300, "f": 10**30, "g": "\x00\u2028"}
    text = render(renderer, "{{ [a, b, c, d, e, f, g] }}", **values)
    assert text == str([[1, "x"], {"k": None}, 1.0, True, -0.5e300, 10**30, "\x00\u2028"])
