"""`npuq chat URL`: the protocol, and servers that break it. None of it needs a model, or torch."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from json_schemas import check
from scripted_server import ASKED, DONE, HANG, STREAM, ScriptedServer, delta, document, event
from terminal_process import TerminalProcess

from npuq.cli.conversation.transcript import Transcript
from npuq.errors import GenerationError

MODELS = [document("200 OK", {"data": [{"id": "tiny", "max_model_len": 4096}]})]
USAGE = {"prompt_tokens": 300, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 256}}


@pytest.fixture
def serve() -> Iterator[Callable[..., ScriptedServer]]:
    """Start a server with its scripts."""
    started: list[ScriptedServer] = []

    def start(*scripts: Any) -> ScriptedServer:
        started.append(ScriptedServer(scripts))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def chat(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run `npuq chat` with lines from a pipe: (exit code, stdout, stderr)."""

    def call(typed: str | bytes, *arguments: object) -> tuple[int, str, str]:
        content = typed.encode() if isinstance(typed, str) else typed
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        code, out, err = run("chat", *arguments)
        return code, out, err

    return call


def answer(*texts: str, reason: str = "stop") -> list[bytes]:
    """The script of an answer as OpenAI streams it."""
    first = delta(role="assistant", content="")
    usage = event({"choices": [], "usage": USAGE})
    return [STREAM, b": ping\n\n", first, *(delta(content=text) for text in texts), delta(reason), usage, DONE]


def test_a_conversation_goes_to_the_server_whole_and_comes_back_in_pieces(serve, chat) -> None:
    server = serve(MODELS, answer("Hel", "lo"), answer("Tues", "day"))
    arguments = ("--system", "Be brief.", "--temperature", "0.5", "--max-new-tokens", "9", "--stop", "x")
    more = ("--chat-template-kwargs", '{"thinking": true}')
    code, out, err = chat("Hi\n\nWhich day?\n/stats\n", server.url, *arguments, *more)
    assert (code, out) == (0, "Hello\nTuesday\n")
    assert "tiny: 4 messages, 305 tokens of 4096" in err and "256 of them from the prefix cache" in err
    (models, _), (_, _), (head, body) = server.requests
    assert models.startswith("GET /v1/models HTTP/1.1") and head.startswith("POST /v1/chat/completions HTTP/1.1")
    assert "Authorization" not in head
    assert json.loads(body) == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Which day?"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "max_tokens": 9,
        "stop": ["x"],
        "chat_template_kwargs": {"thinking": True},
    }


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_pipe_gets_the_answer_without_reasoning_and_json_has_both(name: str, serve, chat) -> None:
    script = [STREAM, delta(**{name: "Hm."}), delta("stop", content="Yes.\n"), DONE]
    assert chat("Well?\n", serve(MODELS, script).url)[1] == "Yes.\n"
    code, out, _ = chat("Well?\n", serve(MODELS, script).url, "--json")
    found = json.loads(out)
    check("chat", found)
    assert code == 0 and found["model"] == "tiny"
    (turn,) = found["turns"]
    assert (turn["question"], turn["content"], turn["reasoning"]) == ("Well?", "Yes.\n", "Hm.")
    assert turn["finish_reason"] == "stop" and turn["prompt_tokens"] is None


def test_a_key_is_sent_from_environment_or_file_and_not_in_a_url(serve, chat, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("NPUQ_API_KEY", "secret-1")
    server = serve(MODELS, MODELS)
    chat("", server.url)
    (tmp_path / "key").write_text("secret-2\nanother\n")
    chat("", server.url, "--api-key-file", tmp_path / "key")
    heads = [head for head, _ in server.requests]
    assert "Authorization: Bearer secret-1" in heads[0] and "Authorization: Bearer secret-2" in heads[1]
    code, _, err = chat("", server.url.replace("//", "//user:secret-3@"))
    assert code == 1 and "secret-3" not in err and "NPUQ_API_KEY" in err
    monkeypatch.setenv("NPUQ_API_KEY", "two words")
    assert chat("", server.url)[0] == 1


ERROR = "\x1b[2J\u202eno \n room"
HOSTILE = {
    "an error in OpenAI's form": (
        [document("429 Busy", {"error": {"message": ERROR}}, "Retry-After: 7\r\n")],
        "in 7 s",
    ),
    "an error that is no JSON": ([b"HTTP/1.1 500 \x1b[31mBad\r\n\r\n<html>"], "status 500"),
    "a redirect": ([b"HTTP/1.1 307 See\r\nLocation: http://169.254.169.254/\x1b[2J\r\n\r\n"], "redirects to http"),
    "no HTTP": ([b"SSH-2.0-OpenSSH_9.6\r\n"], "connection broke"),
    "an endless status line": (itertools.repeat(b"A" * 65536, 100), "connection broke"),
    "endless headers": ([b"HTTP/1.1 200 OK\r\n", *[b"A: b\r\n"] * 300], "connection broke"),
    "nothing": ([b""], "connection broke"),
    "a page": ([b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>"], "answers with text/html"),
    "an answer without a stream": ([document("200 OK", {"choices": []})], "answers with application/json"),
    "an endless line": (itertools.chain([STREAM], itertools.repeat(b"data: " + b"a" * 65530, 200)), "4194304 bytes"),
    "an endless event": (itertools.chain([STREAM], itertools.repeat(b"data: a\n" * 8192, 200)), "4194304 bytes"),
    "broken JSON": ([STREAM, b'data: {"choices": [\n\n'], "not valid JSON"),
    "deep JSON": ([STREAM, b"data: " + b"[" * 100000 + b"\n\n"], "nested too deeply"),
    "a list": ([STREAM, event([1])], "not a JSON object"),
    "NaN": ([STREAM, b'data: {"choices": NaN}\n\n'], "not valid JSON"),
    "choices of a wrong type": ([STREAM, event({"choices": "yes"})], "choices of type str"),
    "a choice of a wrong type": ([STREAM, event({"choices": [7]})], "a choice of type int"),
    "content of a wrong type": ([STREAM, delta(content=["a"])], "content of type list"),
    "reasoning of a wrong type": ([STREAM, delta(reasoning=1)], "reasoning_content of type int"),
    "a finish_reason of a wrong type": ([STREAM, delta(reason={})], "finish_reason of type dict"),  # type: ignore[arg-type]
    "bytes that are no text": ([STREAM, b"data: \xff\xfe\n\n"], "not UTF-8"),
    "a lone surrogate": ([STREAM, b'data: {"choices": [{"delta": {"content": "\\ud800"}}]}\n\n'], "not valid JSON"),
    "an error in the stream": ([STREAM, delta(content="a"), event({"error": {"message": ERROR}})], "no room"),
    "an error that is a text": ([STREAM, event({"error": ERROR})], "no room"),
    "an end in the middle": ([STREAM, delta(content="a")], "ended before the answer did"),
    "a length that is a lie": (
        [b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 999\r\n\r\n" + delta(content="a")],
        "ended before the answer did",
    ),
    "chunks of a wrong length": (
        [STREAM.replace(b"Connection: close", b"Transfer-Encoding: chunked") + b"-5\r\nabc"],
        "connection broke",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_answer_is_one_line(what: str, serve, chat) -> None:
    script, expected = HOSTILE[what]
    server = serve(MODELS, script)
    code, _, err = chat("Hi\n", server.url, "--quiet")
    assert code == 1
    line = err.removesuffix("\n")
    assert line.startswith(f"npuq: error: {server.url}") and expected in line, err
    assert line.isprintable() and len(line) < 700


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ([document("200 OK", {"data": []})], "lists no model"),
        ([document("200 OK", {"data": [{"id": 7}]})], "lists no model"),
        ([document("200 OK", ["tiny"])], "not a JSON object"),
        ([document("404 Not Found", {"detail": "Not Found"})], "Not Found (status 404)"),
        ([document("401 Unauthorized", {"error": {"message": "who?"}})], "NPUQ_API_KEY"),
        (itertools.chain([b"HTTP/1.1 200 OK\r\n\r\n"], itertools.repeat(b"a" * 65536, 200)), "larger than"),
    ],
)
def test_a_hostile_list_of_models_is_one_line(models, expected: str, serve, chat) -> None:
    code, out, err = chat("Hi\n", serve(models).url)
    assert (code, out) == (1, "") and err.count("\n") == 1 and expected in err


def test_what_a_server_says_cannot_control_the_terminal(serve, chat) -> None:
    text = "a\x1b]52;c;x\x07\x9b2J\u202eb\tc\r"
    models = [document("200 OK", {"data": [{"id": "\x1b[31mtiny"}]})]
    code, out, err = chat("Hi\n/stats\n", serve(models, answer(text, reason="\x1b[2J")).url)
    assert code == 0
    assert out == "a\\x1b]52;c;x\\x07\\x9b2J\\u202eb\tc\\r\n"
    assert not set("\x1b\x07\x9b") & set(err)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://", 1),
        ("http://[::1", 1),
        ("http://a b/", 1),
        ("http://host:99999/", 1),
        ("http://host/v1?x=1", 1),
        ("http://ho\x1bst/", 1),
        ("https://" + "a" * 70 + ".invalid/v1", 1),
        ("http://127.0.0.1:9/v1", 1),
    ],
)
def test_a_url_that_leads_nowhere_is_one_line(url: str, code: int, chat) -> None:
    status, out, err = chat("", url)
    assert (status, out) == (code, "") and err.count("\n") == 1 and err.removesuffix("\n").isprintable()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("http://127.0.0.1:9", "--backend", "cpu"), "--backend is not for a server's URL"),
        (("http://127.0.0.1:9", "--chat-template-kwargs", "[]"), "not a JSON object"),
        (("somewhere", "--model", "x"), "--model is not for a model in this process"),
    ],
)
def test_options_that_do_not_fit_are_wrong_usage(arguments, expected: str, chat) -> None:
    code, _, err = chat("", *arguments)
    assert code == 2 and expected in err


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("/nonsense\n", "/nonsense is no command"),
        ("/usr/bin/\x1b\n", "is no command"),
        ('"""\nnever ends\n', "has no end"),
        (b"\xff\n", "line 1 of standard input is not UTF-8"),
        ("/set temperature\n", "NAME=VALUE"),
        ("/set n=2\n", "n is no setting"),
        ("/set temprature=1\n", "temprature is no setting; there are temperature"),
        ("/set top-p=\n", "top_p is not set"),
        ("/load nowhere.json\n", "nowhere.json"),
        ("/retry\n", "no question"),
        ("/undo\n", "no question"),
        (b"a" * ((8 << 20) + 1), "more than 8388608 bytes"),
    ],
)
def test_wrong_lines_of_a_pipe_end_it(typed: str | bytes, expected: str, serve, chat) -> None:
    code, out, err = chat(typed, serve(MODELS).url)
    assert (code, out) == (1, "") and expected in err.splitlines()[-1] and "\x1b" not in err


def test_commands_change_the_conversation(serve, chat, tmp_path) -> None:
    server = serve(MODELS, answer("one"), answer("two"), answer("three"), answer("four"), answer("five"))
    saved = tmp_path / "saved.json"
    lines = [
        "/system Be brief.",
        "first",
        "/set temperature=0.25",
        '/set stop=["x"]',
        '"""',
        "//second",
        '/of two lines"""',
        f"/save {saved}",
        "/retry",
        "/undo",
        '/system ""',
        "/set stop=",
        "//third",
        f"/load {saved}",
        f"/save {saved}",
        "last",
        "/clear",
        "/exit",
        "never asked",
    ]
    code, out, err = chat("\n".join(lines), server.url)
    assert (code, out) == (0, "one\ntwo\nthree\nfour\nfive\n"), err
    asked = [json.loads(body) for _, body in server.requests[1:]]
    contents = [[message["content"] for message in each["messages"]] for each in asked]
    second = "//second\n/of two lines"
    assert contents == [
        ["Be brief.", "first"],
        ["Be brief.", "first", "one", second],
        ["Be brief.", "first", "one", second],
        ["first", "one", "/third"],
        ["Be brief.", "first", "one", second, "two", "last"],
    ]
    assert [(each.get("temperature"), each.get("stop")) for each in asked] == [
        (None, None),
        (0.25, ["x"]),
        (0.25, ["x"]),
        (0.25, None),
        (0.25, None),
    ]
    assert json.loads(saved.read_text())["messages"][-1] == {"role": "assistant", "content": "two"}
    # Another conversation's file is kept.
    code, _, err = chat(f"/save {saved}\n", serve(MODELS).url)
    assert code == 1 and "exists already" in err


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the disk is slow, before the file has its name."""

    def interrupted(number: int) -> None:
        raise KeyboardInterrupt

    transcript = Transcript()
    transcript.answered("one", "two", "")
    transcript.save(tmp_path / "saved.json")
    assert (tmp_path / "saved.json").stat().st_mode & 0o777 == 0o600
    before = (tmp_path / "saved.json").read_bytes()
    transcript.answered("three", "four", "")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", interrupted)
        transcript.save(tmp_path / "saved.json")
    assert [path.name for path in tmp_path.iterdir()] == ["saved.json"]
    assert (tmp_path / "saved.json").read_bytes() == before
    with pytest.raises(GenerationError, match="cannot be written"):
        transcript.save(tmp_path / "no folder" / "saved.json")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"messages": 7}',
        "[7]",
        '[{"role": "tool", "content": "x"}]',
        '[{"role": "user", "content": [{"type": "image_url"}]}]',
        '[{"role": "user"}]',
        '[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]',
        '[{"role": "assistant", "content": "a", "reasoning_content": 7}]',
    ],
)
def test_a_file_that_holds_no_conversation_is_refused_in_one_line(content: str, chat, tmp_path) -> None:
    (tmp_path / "x.json").write_text(content)
    code, _, err = chat("", "http://127.0.0.1:9", "--load", tmp_path / "x.json")
    assert code == 1 and err.count("\n") == 1 and "x.json" in err


def test_ctrl_c_stops_an_answer_and_keeps_it_and_twice_leaves(serve) -> None:
    cut = [STREAM, delta(reasoning="Hm. "), delta(content="Half an ans"), HANG]
    broken = [document("500 Broken", {"error": {"message": "tea\x1b[2Jpot"}})]
    server = serve(MODELS, [STREAM, ASKED, HANG], cut, broken, answer("whole"))
    process = TerminalProcess("chat", server.url)
    try:
        process.expect("> ")
        process.type("Hi\n")
        assert server.asked.wait(60)
        process.type("\x03")
        process.expect(r"stopped before any text came")
        process.type("/retry\n")
        assert "\x1b[2mHm. \x1b[0m\n\nHalf an ans" in process.expect("Half an ans")
        process.type("\x03")
        process.expect(r"\(stopped; Ctrl-C again, or Ctrl-D, leaves\)\n")
        assert server.left.wait(60)
        process.type("Again\n")
        process.expect(r"npuq: .*tea\\x1b\[2Jpot \(status 500\)\n")  # a line, and the conversation goes on
        process.type("/retry\n")
        process.expect("whole\n")
        process.type("\x03")
        process.expect(r"\(Ctrl-C again, or Ctrl-D, leaves\)")
        process.type("\x03")
        assert process.wait() == 130 and process.shown.endswith("npuq: error:\x1b[0m interrupted\n")
    finally:
        process.kill()
    messages = json.loads(server.requests[-1][1])["messages"]
    assert [message["content"] for message in messages] == ["Hi", "Half an ans", "Again"]


def test_no_color_and_no_reasoning(serve) -> None:
    script = [STREAM, delta(reasoning="Hm.\n"), delta("stop", content="Yes."), DONE]
    server = serve(MODELS, script, MODELS, script)
    for arguments, environment, expected in (
        ((), {"NO_COLOR": "1"}, "[reasoning]\nHm.\n\n[answer]\nYes.\n"),
        (("--no-reasoning",), {}, "Yes.\n"),
    ):
        process = TerminalProcess("chat", server.url, *arguments, environment=environment)
        try:
            process.expect("> ")
            process.type("Hi\n")
            shown = process.expect(r"Yes\.\n")
            assert shown.endswith(f"Hi\n{expected}") and "\x1b[2m" not in shown
            process.expect("> ")  # before it the terminal, and not the command, would take Ctrl-D
            process.type("\x04")
            assert process.wait() == 0
        finally:
            process.kill()
