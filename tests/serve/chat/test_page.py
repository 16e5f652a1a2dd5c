"""The page at `/`: alone in the world under its policy, and in a browser: type, stream, stop, reload."""

from __future__ import annotations

import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from npuq.runtime import LanguageModel, SamplingParams
from npuq.serve.http.access import Access
from npuq.serve.page.document import document
from npuq.serve.service import Service

from ..browser import Browser
from ..conftest import Running, running
from .chat_models import ScriptedConversations

ANSWER = """Some **bold** text with `code <b>`:

| a | b |
|---|---|
| 1 | <img src=x onerror=document.title='hit'> |

1. one
   - [safe](https://example.com/x) and [unsafe](javascript:document.title='hit')

```html
<script>document.title = 'hit'</script>
```"""


def test_it_loads_nothing_and_its_policy_allows_its_own_scripts_alone(chat_server: Running) -> None:
    with urllib.request.urlopen(chat_server.url) as response:
        content = response.read().decode()
        policy = response.headers["Content-Security-Policy"]
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert not re.search(r"""(?:src|href|action)=["'](?!data:)|@import|url\(""", content)
    assert "unsafe" not in policy and "http" not in policy
    assert policy.startswith("default-src 'none'; connect-src 'self'; ") and "frame-ancestors 'none'" in policy
    # Nodes are made, and no text is read as markup.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", content)


def test_it_can_be_left_out(chat_model: LanguageModel) -> None:
    with (
        running(Service(chat_model, ["tiny"], SamplingParams(), has_page=False)) as server,
        pytest.raises(urllib.error.HTTPError, match="404"),
    ):
        urllib.request.urlopen(server.url)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if shutil.which("chromium") is None:
        pytest.skip("needs chromium")
    found = Browser(tmp_path_factory.mktemp("browser") / "profile")
    yield found
    found.close()


def text(browser: Browser, selector: str) -> str:
    return str(browser.evaluate(f"[...document.querySelectorAll({selector!r})].at(-1)?.innerText ?? ''"))


def ask(browser: Browser, question: str) -> None:
    browser.evaluate("document.querySelector('#question').focus()")
    browser.type(question)
    browser.press("Enter")


IDLE = "document.querySelector('#send').textContent === 'Send'"


def test_a_conversation_in_a_browser(browser: Browser, chat_server: Running, script: ScriptedConversations) -> None:
    browser.open(chat_server.url)
    browser.wait("document.querySelector('#model').textContent === 'tiny'")
    browser.wait("document.querySelector('#status').textContent.includes('cache')")

    script.say(f"<think>Let me see.</think>{ANSWER}")
    ask(browser, "What is <b>bold</b>?")
    browser.wait(f"document.querySelectorAll('.numbers').length === 1 && {IDLE}")
    assert text(browser, ".question .text") == "What is <b>bold</b>?"
    assert text(browser, ".answer strong") == "bold" and text(browser, ".answer :not(pre) > code") == "code <b>"
    assert browser.evaluate("document.querySelector('.answer td:last-child').textContent").startswith("<img src=x")
    assert browser.evaluate("document.querySelector('.answer pre').textContent").startswith("<script>")
    links = browser.evaluate("[...document.querySelectorAll('.answer a')].map((each) => each.href)")
    assert links == ["https://example.com/x"] and "[unsafe]" in text(browser, ".answer ol ul li")
    reasoning = browser.evaluate(
        "[document.querySelector('details').open, document.querySelector('.thought').textContent]"
    )
    assert reasoning == [False, "Let me see."]
    assert re.fullmatch(
        r"\d+ tokens \(\d+ of reasoning\) · [\d.]+ tokens/s · first after [\d.]+ s · 0 of \d+ prompt tokens from the "
        "cache",
        text(browser, ".numbers"),
    )
    browser.wait("document.title === 'tiny · npuq'")

    # Without a script the model goes on until it is stopped.
    ask(browser, "Go on.")
    browser.wait("document.querySelectorAll('.answer')[1]?.querySelector('.text').textContent.length > 20")
    assert text(browser, "#send") == "Stop"
    browser.press("Escape")
    browser.wait(f"document.querySelectorAll('.numbers').length === 2 && {IDLE}")
    assert "stopped" in text(browser, ".numbers")
    browser.wait("document.querySelector('#status').textContent.startsWith('Idle')")  # the server has noticed
    assert "What is <b>bold</b>?" in script.prompt and "Let me see" not in script.prompt

    kept = text(browser, ".answer .text")
    browser.reload()
    browser.wait("document.querySelectorAll('.answer').length === 2")
    assert text(browser, ".answer .text") == kept and text(browser, ".answer strong") == "bold"

    browser.evaluate("document.querySelector('#new').click()")
    assert browser.evaluate("document.querySelector('#messages').childNodes.length") == 0
    browser.reload()
    assert browser.evaluate("document.querySelector('#messages').childNodes.length") == 0
    assert browser.errors == []


def test_settings_reach_the_server_and_errors_the_reader(browser: Browser, chat_model: LanguageModel) -> None:
    service = Service(chat_model, ["tiny"], SamplingParams(), access=Access.of(["secret"]))
    service.conversations = script = ScriptedConversations(chat_model, chat_model.reply_format)
    with running(service) as server:
        browser.resize(390, 844, phone=True)
        browser.open(server.url)
        ask(browser, "Hi")
        browser.wait("document.querySelector('.error:not([hidden])') !== null")
        assert "no valid key" in text(browser, ".error")
        assert browser.evaluate("document.activeElement.name") == "key"  # the settings have opened
        browser.type("secret")
        for name, value in (("system", "Be brief."), ("max_tokens", "3"), ("temperature", "0"), ("reasoning", "on")):
            browser.evaluate(f"document.querySelector('[name={name}]').value = {value!r}")
        browser.evaluate("document.querySelector('#close').click()")
        browser.evaluate("[...document.querySelectorAll('.under button')].at(-1).click()")
        browser.wait(f"document.querySelectorAll('.numbers').length === 1 && {IDLE}")
        assert "3 tokens" in text(browser, ".numbers") and "cut at its limit of tokens" in text(browser, ".numbers")
        assert script.prompt.startswith("Be brief.\nUser: Hi\nAssistant: <think>")
        assert browser.evaluate("document.documentElement.scrollWidth") == 390  # nothing sticks out
        browser.evaluate("sessionStorage.clear()")


@pytest.mark.parametrize(
    "part",
    [
        "*",
        "**",
        "_ ",
        "[",
        "](",
        "`",
        "``a",
        "> ",
        "- ",
        "* a",
        "\\n",
        "|-",
        "| a |\\n|---|\\n",
        "~",
        "#",
        "# #",
        "1. \\n  ",
        "http://",
        "![",
        "*a**b",
        "<b>",
        "- \\u2028",
        "`a\\n",
    ],
)
def test_hostile_markdown_takes_no_time(part: str, browser: Browser, chat_server: Running) -> None:
    """100,000 characters: as much as a long answer of a real model."""
    if browser.evaluate("location.origin") != chat_server.url:
        browser.open(chat_server.url)
    milliseconds = browser.evaluate(
        f"""(() => {{
            const started = performance.now();
            new MarkdownView(document.createElement("div")).show("{part}".repeat(100000 / "{part}".length) + "`](x)*");
            return performance.now() - started;
        }})()"""
    )
    assert milliseconds < 5000


def test_the_policy_is_of_what_is_sent() -> None:
    """A stale digest would leave a page without its script: both come from the same text."""
    content, policy = document()
    assert b"{{" not in content.split(b"<script>")[0] and policy.count("sha256-") == 2
