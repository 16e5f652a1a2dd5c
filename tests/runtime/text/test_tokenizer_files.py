"""Tokenizer files from outside: what is damaged or made to harm is refused in one line."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npuq.errors import GenerationError
from npuq.runtime.text.tokenizer import Tokenizer

from .plain_text import PlainText

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "tiny-deepseek-v3-fp8"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, tmp_path)
    return tmp_path


def change(directory: Path, **parts: Any) -> Path:
    """Replace parts of tokenizer.json."""
    path = directory / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **parts}), encoding="utf-8")
    return directory


def configure(directory: Path, **values: Any) -> Path:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return directory


def refused(directory: Path, expected: str) -> None:
    with pytest.raises(GenerationError, match=expected) as caught:
        Tokenizer(directory)
    assert str(caught.value).isprintable()


# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[]", "not a JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"a": ' * 100 + b"1" + b"}" * 100, "nested more than 64 levels"),
        (b'{"model_max_length": NaN}', "NaN"),
        (b'{"bos_token": "\\ud800"}', "surrogate"),
        (b'{"bos_token": 5}', "bos_token must be text, not 5"),
        (b'{"eos_token": ["a"]}', "eos_token must be text"),
        (b'{"pad_token": {"content": {}}}', "pad_token must be text"),
        (b'{"chat_template": 5}', "chat_template 'default' must be text"),
        (b'{"chat_template": ["x"]}', "chat_template must list objects with name and template"),
        (b'{"chat_template": [{"name": 1, "template": "x"}]}', "chat_template must list objects"),
        (b'{"chat_template": [{"name": "a\\u001b"}]}', r"chat_template 'a\\x1b' must be text"),
        (b'{"chat_template": "' + b"x" * (2 << 20) + b'"}', "chat_template is longer"),
        (b" " * (17 << 20), "is larger than"),
    ],
)
def test_configurations(files: Path, content: bytes, expected: str) -> None:
    (files / "tokenizer_config.json").write_bytes(content)
    refused(files, rf"tokenizer_config\.json: .*{expected}")


def test_long_model_max_length_is_fine(files: Path) -> None:
    configure(files, model_max_length=int(1e30))
    assert Tokenizer(files).encode("whale")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_out(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def dangling(path: Path) -> None:
    path.symlink_to("nothing")


def directory(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [fifo, link_out, dangling, directory])
@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "rag.jinja"],
)
def test_what_is_no_file_of_the_checkpoint(files: Path, name: str, make: Callable[[Path], None]) -> None:
    path = files / name
    if name == "rag.jinja":
        path = files / "additional_chat_templates" / name
        path.parent.mkdir()
    path.unlink(missing_ok=True)
    make(path)
    refused(files, name.replace(".", r"\."))


def test_templates_that_are_no_text_or_too_long(files: Path) -> None:
    (files / "chat_template.jinja").write_bytes(b"\xff")
    refused(files, r"chat_template\.jinja: is not UTF-8 text")
    (files / "chat_template.jinja").write_bytes(b"x" * (2 << 20))
    refused(files, r"chat_template\.jinja: is larger than")


# ---- tokenizer.json --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        {"model": None},
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}},
        {"model": {"type": "Unigram", "unk_id": 5, "vocab": [], "byte_fallback": False}},
        {"decoder": {"type": "Sequence", "decoders": [{"type": "Strip", "content": "", "start": 0, "stop": 0}]}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},  # panics too, when it encodes
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
        {"decoder": {"type": "Strip", "content": "H", "start": 1, "stop": 2**64 - 1}},
    ],
)
def test_failures_of_the_library(files: Path, parts: dict[str, Any]) -> None:
    change(files, **parts)
    with pytest.raises(GenerationError) as caught:
        tokenizer = Tokenizer(files)
        tokenizer.decode(tokenizer.encode("Hello"))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////fwAAAAAAAAA="}}, "Precompiled"),
        (
            {
                "model": {
                    "type": "BPE",
                    "vocab": {"a": 0, "##é": 1, "aé": 3},
                    "merges": ["a ##é"],
                    "continuing_subword_prefix": "###",
                }
            },
            "continuing_subword_prefix",
        ),
    ],
)
def test_parts_that_abort_the_library(files: Path, parts: dict[str, Any], expected: str, hidden: bool) -> None:
    change(files, **parts)
    path = files / "tokenizer.json"
    text = path.read_text()
    if hidden:
        text = text.replace("compiled", "\\u0063ompiled").replace("_subword", "_\\u0073ubword")
    path.write_text(text.replace("{", '{"normalizer": null, ', 1))  # and a key twice
    refused(files, f"tokenizer.json: a {expected}.* is not read")


def test_escaped_letters_are_fine(files: Path) -> None:
    """As some writers of JSON have < and >."""
    whole = Tokenizer(files).encode("<|eos|>It was")
    path = files / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<|", "\\u003c|"), encoding="utf-8")
    assert Tokenizer(files).encode("<|eos|>It was") == whole


def test_an_interruption_is_not_the_librarys(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from npuq.runtime.text.codec import guarded

    for error in (KeyboardInterrupt, MemoryError, SystemExit, GeneratorExit):

        def fail(error: type[BaseException] = error) -> None:
            raise error

        with pytest.raises(error):
            guarded(fail, "it fails")


def test_a_pattern_that_takes_years(files: Path) -> None:
    change(
        files,
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    )
    with pytest.raises(GenerationError, match=r"the tokenizer fails to encode: .*limit"):
        Tokenizer(files).encode("a" * 40 + "!")


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
@pytest.mark.parametrize(
    "steps",
    [
        [replace({"String": "a"}, "a" * 10)] * 20,
        [replace({"Regex": "."}, "aa")] * 20,
        [replace({"String": "a"}, "a" * 100_000)],
    ],
)
def test_texts_do_not_grow_without_end(files: Path, part: str, steps: list[Any]) -> None:
    change(files, **{part: {"type": "Sequence", f"{part}s": steps}})
    refused(files, rf"tokenizer\.json: its {part} can make a text more than 4096 times longer")


def test_prepended_text_counts_too(files: Path) -> None:
    change(files, normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "aa"}] * 20})
    refused(files, "its normalizer can make")


def template(pieces: list[Any], ids: int = 1) -> dict[str, Any]:
    specials = {"<|bos|>": {"id": "<|bos|>", "ids": [0] * ids, "tokens": ["<|bos|>"] * ids}}
    return {"type": "TemplateProcessing", "single": pieces, "pair": [*pieces, B], "special_tokens": specials}


A, B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
BOS = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (template([A] * 100_000), "repeats the text"),
        (template([A, A]), "repeats the text"),
        (template([BOS] * 10_000 + [A]), "more than 4096 tokens"),
        (template([BOS, A], ids=10_000), "more than 4096 tokens"),
        (template([BOS] * 3000 + [A]), "more than 4096 tokens"),
    ],
)
def test_post_processors_do_not_repeat_texts(files: Path, step: dict[str, Any], expected: str) -> None:
    change(files, post_processor={"type": "Sequence", "processors": [step, step]})
    refused(files, rf"tokenizer\.json: its post_processor .*{expected}")
    change(files, post_processor=template([BOS, A]))
    assert Tokenizer(files).encode("whale")[0] == 0


def test_what_known_tokenizers_replace_is_fine(files: Path) -> None:
    """As those of Llama 2 and Gemma do."""
    space = [{"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁"), {"type": "NFKC"}]
    back = [replace({"String": "▁"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    change(
        files,
        normalizer={"type": "Sequence", "normalizers": space},
        decoder={"type": "Sequence", "decoders": back},
    )
    assert Tokenizer(files).encode("a b c")


def test_settings_of_training_do_not_cut_prompts(files: Path) -> None:
    """transformers does not apply them either where it is not asked to."""
    whole = Tokenizer(files).encode("It was the best of times")
    change(
        files,
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 2,
            "pad_type_id": 0,
            "pad_token": "<|pad|>",
        },
    )
    assert Tokenizer(files).encode("It was the best of times") == whole


# ---- older formats ---------------------------------------------------------------------------------------------------


@pytest.fixture
def older(files: Path) -> Path:
    """The same vocabulary as vocab.json and merges.txt, for transformers to convert."""
    pytest.importorskip("transformers")
    model = json.loads((files / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = {**model["model"]["vocab"], **{token["content"]: token["id"] for token in model["added_tokens"]}}
    (files / "vocab.json").write_text(json.dumps(tokens))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["model"]["merges"]]
    (files / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (files / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "vocab_size": len(tokens)}))
    (files / "tokenizer.json").unlink()
    return configure(files, tokenizer_class="GPT2Tokenizer", unk_token="<|eos|>")


def test_an_older_format_is_converted(older: Path) -> None:
    tokenizer = Tokenizer(older)
    size = len(json.loads((older / "vocab.json").read_text()))
    assert tokenizer.vocab_size == size
    assert tokenizer.decode(tokenizer.encode("It was the best of times")) == "It was the best of times"


@pytest.mark.parametrize("make", [fifo, link_out, dangling, directory])
@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "added_tokens.json", "config.json"])
def test_older_files_that_are_none_of_the_checkpoint(older: Path, name: str, make: Callable[[Path], None]) -> None:
    (older / name).unlink(missing_ok=True)
    make(older / name)
    refused(older, name.replace(".", r"\."))


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_no_vocabulary_is_made_up(older: Path, kind: str) -> None:
    for name in ("vocab.json", "merges.txt"):
        (older / name).unlink()
    (older / "vocab.txt").write_text("a\nb\n")
    (older / "config.json").unlink()
    configure(older, tokenizer_class=kind)
    refused(older, r"no tokenizer\.json|no (vocab\.json|tokenizer\.model), which holds the vocabulary")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_a_vocabulary(older: Path, name: str) -> None:
    (older / name).unlink()
    (older / "vocab.txt").write_text("a\nb\n")
    refused(older, r"no tokenizer\.json; copy the model's tokenizer files there")


@pytest.mark.parametrize("key", ["vocab_file", "merges_file", "tokenizer_file", "vocab", "name_or_path"])
def test_configurations_name_no_files(older: Path, key: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "vocab.json"
    shutil.copy(EXAMPLE / "tokenizer.json" if key == "tokenizer_file" else older / "vocab.json", elsewhere)
    for name in ("vocab.json", "merges.txt"):
        (older / name).unlink()
    (older / "vocab.txt").write_text("a\n")
    configure(older, **{key: str(elsewhere)})
    refused(older, "holds the vocabulary")


def test_a_vocabulary_of_another_model(older: Path) -> None:
    config = {"model_type": "deepseek_v3", "vocab_size": 100_000}
    (older / "config.json").write_text(json.dumps(config))
    refused(older, "its tokenizer has [0-9]+ tokens, and config.json's vocab_size is 100000")


def test_a_special_token_that_is_none(older: Path) -> None:
    configure(older, bos_token="<nowhere>")
    refused(older, "bos_token '<nowhere>' is no token of its vocabulary")


def test_a_token_as_long_as_a_book(files: Path) -> None:
    content = json.loads((files / "tokenizer.json").read_text(encoding="utf-8"))
    token = len(content["model"]["vocab"])
    content["model"]["vocab"]["a" * 1_000_000] = token
    (files / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    text = PlainText(Tokenizer(files), [0], ())
    with pytest.raises(GenerationError, match=f"token {token} is a text of 1000000 characters"):
        text.add(token)


def test_mutations_of_the_files_end_in_one_line(files: Path) -> None:
    """Values of another type anywhere in either file: the tokenizer works, or says in one line why not."""
    random.seed(5)
    strange: list[Any] = [None, True, -1, 2**70, 1.5, "", "x\x1b", [], {}, [[]], {"a": []}, "\x00" * 100]
    originals = {name: json.loads((files / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")}
    for number in range(50):
        name = random.choice(list(originals))
        content = json.loads(json.dumps(originals[name]))
        place: Any = content
        while True:
            key = random.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[key], (dict, list)) and place[key] and len(place[key]) < 50 and random.random() < 0.8:
                place = place[key]
                continue
            place[key] = random.choice(strange)
            break
        (files / name).write_text(json.dumps(content))
        try:
            tokenizer = Tokenizer(files)
            tokenizer.decode(tokenizer.encode("Hello, whale"))
            tokenizer.chat("x", chat_template="{{ messages }}{{ bos_token }}")
        except GenerationError as error:
            assert str(error).isprintable(), (number, str(error))
        (files / name).write_text(json.dumps(originals[name]))
