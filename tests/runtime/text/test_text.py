"""Text out of tokens: never half a character, never a stop string, nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npuq.errors import GenerationError
from npuq.runtime import LanguageModel
from npuq.runtime.text.tokenizer import Tokenizer

from .plain_text import PlainText

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "tiny-deepseek-v3-fp8"
TOKENIZER = Tokenizer(EXAMPLE)


def stream(ids: list[int], stop: tuple[str, ...] = (), prompt: tuple[int, ...] = (0,)) -> tuple[list[str], PlainText]:
    text = PlainText(TOKENIZER, prompt, stop)
    pieces = []
    for token in ids:
        pieces.append(text.add(token))
        if text.stopped:
            return pieces, text
    pieces.append(text.flush())
    return pieces, text


@given(st.text(max_size=40))
def test_any_text_survives(text: str) -> None:
    ids = TOKENIZER.encode(text, special=False)
    pieces, collected = stream(ids)
    assert "".join(pieces) == collected.text == TOKENIZER.decode(ids)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=20))
def test_any_tokens_survive(ids: list[int]) -> None:
    """Bytes that are no UTF-8 too: what is given out in the end is the tokens' text."""
    pieces, _ = stream(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids)


def test_characters_come_whole() -> None:
    ids = TOKENIZER.encode("naïve 鯨 🐋!", special=False)
    pieces, _ = stream(ids)
    assert len(ids) > len("naïve 鯨 🐋!") - 4
    assert "🐋" in pieces
    assert "鯨" in "".join(pieces)


def test_unfinished_character_is_given_at_the_end() -> None:
    ids = TOKENIZER.encode("a🐋", special=False)[:-1]
    pieces, _ = stream(ids)
    assert pieces[:-1] == ["a", *[""] * (len(ids) - 1)]
    assert set(pieces[-1]) == {"\N{REPLACEMENT CHARACTER}"}


@given(st.text("ab\n", max_size=24), st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings(text: str, stops: list[str]) -> None:
    """The text ends before the stop string that appears first, and nothing after or of it was ever given out."""
    ids = TOKENIZER.encode(text, special=False)
    pieces, collected = stream(ids, tuple(stops))
    found = [text.find(stop) for stop in stops if stop in text]
    assert collected.stopped == bool(found)
    if not found:
        assert "".join(pieces) == text
        return
    given_out = "".join(pieces)
    # Several may end within one token; the earliest beginning counts among those seen by then.
    assert text.startswith(given_out)
    assert not any(stop in given_out for stop in stops)
    assert any(text[len(given_out) :].startswith(stop) for stop in stops)


def test_stop_string_ends_generation(example: LanguageModel) -> None:
    free = example.generate("Call me", max_new_tokens=30, temperature=0)
    stop = free.text[20:26]
    place = free.text.find(stop)
    done = example.generate("Call me", max_new_tokens=30, temperature=0, stop=stop)
    assert done.finish_reason == "stop"
    assert done.text == free.text[:place]
    assert done.completion_tokens < 30
    assert (
        "".join(piece.text for piece in example.stream("Call me", max_new_tokens=30, temperature=0, stop=[stop]))
        == done.text
    )


# ---- tokenizer files -------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, tmp_path)
    return tmp_path


def configure(directory: Path, **changes: object) -> Tokenizer:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return Tokenizer(directory)


def test_special_tokens(files: Path) -> None:
    tokenizer = Tokenizer(files)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.decode([0, *tokenizer.encode("whale"), 1]) == "whale"
    assert tokenizer.encode("<|bos|>whale")[0] == 0
    as_object = configure(files, bos_token={"content": "<|doc|>", "lstrip": False})
    assert as_object.bos_id == 3
    assert configure(files, bos_token=None).bos_id is None


def test_bos_is_added_where_the_config_says(files: Path) -> None:
    plain = Tokenizer(files).encode("whale")
    tokenizer = configure(files, add_bos_token=True)
    assert tokenizer.encode("whale") == [0, *plain]
    assert tokenizer.encode("whale", special=False) == plain
    assert tokenizer.encode("<|bos|>whale") == [0, *plain]


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'fail' %}{{ raise_exception('no ' + message.role) }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("where", ["config", "list", "file"])
def test_chat_template(files: Path, where: str) -> None:
    if where == "file":
        (files / "chat_template.jinja").write_text(TEMPLATE)
        tokenizer = Tokenizer(files)
    else:
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
        tokenizer = configure(files, chat_template=TEMPLATE if where == "config" else named)
    ids = tokenizer.chat([{"role": "user", "content": "whale?"}])
    assert ids[0] == 0
    assert tokenizer.decode(ids) == "[user] whale?\n[assistant]"
    with pytest.raises(GenerationError, match="chat template failed: no fail"):
        tokenizer.chat([{"role": "fail", "content": ""}])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{{ ''.__class__.__base__ }}",
        "{% for",
    ],
)
def test_chat_template_is_confined(files: Path, attack: str) -> None:
    tokenizer = configure(files, chat_template=attack)
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(GenerationError, match="chat template failed"):
        tokenizer.chat(messages)
    assert len(messages) == 1


def test_no_chat_template(files: Path) -> None:
    with pytest.raises(GenerationError, match="no chat template"):
        Tokenizer(files).chat([{"role": "user", "content": "x"}])


def test_unreadable_tokenizer(files: Path) -> None:
    (files / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(GenerationError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        Tokenizer(files)


def test_unreadable_tokenizer_config(files: Path) -> None:
    (files / "tokenizer_config.json").write_text("[]")
    with pytest.raises(GenerationError, match=r"tokenizer_config\.json: not a JSON object"):
        Tokenizer(files)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    """A tokenizer that only exists as code in the checkpoint: refused, and the code was never imported."""
    (tmp_path / "config.json").write_text('{"model_type": "kimi_k2"}')
    auto_map = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": auto_map}))
    marker = tmp_path / "ran"
    (tmp_path / "tokenization_evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: ...\n")
    with pytest.raises(GenerationError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    assert not marker.exists()


def test_a_token_is_decoded_about_once(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text grows by one call into the tokenizer a token, not by one for its context each time too."""
    tokenizer = Tokenizer(files)
    ids = tokenizer.encode("It was the best of times, it was the worst of times, " * 12, special=False)
    calls: list[int] = []
    decode = tokenizer.decode

    def counted(given: list[int]) -> str:
        calls.append(len(given))
        return decode(given)

    monkeypatch.setattr(tokenizer, "decode", counted)
    stream = PlainText(tokenizer, ids[:5], ())
    text = "".join(map(stream.add, ids[5:])) + stream.flush()
    assert text == decode(ids)[len(decode(ids[:5])) :]
    assert len(calls) < 1.2 * len(ids) and max(calls) < 40
