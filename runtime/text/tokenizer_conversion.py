"""Conversion of a tokenizer in an older format to `tokenizer.json`, by transformers.

transformers opens any path that a file of the checkpoint names, follows links, and makes up a vocabulary of a few
tokens where it finds none. So it gets a directory of its own with copies of the few files that it needs, and its result
is compared with config.json and the checkpoint's special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from ...errors import GenerationError
from ...inputs.files import inside, is_inside, read_bytes
from ...inputs.json_text import read_object
from ...inputs.printable import printable, shown
from .codec import FastCodec, guarded
from .sentencepiece_model import NAMES, SentencePieceModel
from .tokenizer_check import (
    MOST_CONFIG_BYTES,
    SPECIAL_TOKENS,
    VOCABULARY_FILES,
    check_vocabulary_size,
    model_vocabulary_size,
    require_tokenizer,
)

_FAST_FILE: Final = "tokenizer.json"
# It follows a SentencePiece model's own settings. Those of the named classes assume the settings of one model:
# LlamaTokenizer drops the prefix before a text that begins with a space.
_ANY_CLASS: Final = "PreTrainedTokenizerFast"

_SPECIAL: Final = (*SPECIAL_TOKENS, "additional_special_tokens", "extra_special_tokens")
# Keys that change tokenization. Other keys may name files (`vocab_file`, `name_or_path`) or code (`auto_map`).
_OPTIONS: Final = (
    *_SPECIAL,
    "tokenizer_class",
    "added_tokens_decoder",
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "byte_fallback",
    "clean_up_tokenization_spaces",
    "do_lower_case",
    "errors",
    "legacy",
    "split_special_tokens",
    "strip_accents",
    "tokenize_chinese_chars",
)
_COPIED_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "tokenizer_config.json": _OPTIONS,
    "special_tokens_map.json": _SPECIAL,
    "config.json": ("model_type", "tokenizer_class"),
}


def converted(directory: Path) -> FastCodec:
    """Convert the files of a directory to a `tokenizer.json` with transformers, without running code of the directory.

    Raises GenerationError where transformers is missing or fails, and for a vocabulary that is not the model's: its
    files are missing, it is far smaller than config.json's, it lacks special tokens that the checkpoint names, or it
    does not encode as the SentencePiece model that it was made of.
    """
    require_tokenizer(directory)
    missing = f"{directory}: no tokenizer.json; copy the model's tokenizer files there"
    try:
        import transformers
    except ImportError:
        raise GenerationError(f"{missing}, or install transformers to convert an older format") from None

    models = [
        SentencePieceModel(inside(directory, file, GenerationError)) for file in NAMES if is_inside(directory, file)
    ]
    with TemporaryDirectory(prefix="npuq-tokenizer-") as name:
        copy = Path(name)
        _copy_files(directory, copy, _ANY_CLASS if models else None)

        def convert() -> str:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=True)
            _require_files(directory, copy, tokenizer)
            _check_vocabulary(directory, tokenizer)
            text: str = tokenizer.backend_tokenizer.to_str()
            return text

        content = guarded(convert, f"{missing}; transformers cannot convert what is there").encode()
    codec = FastCodec(content, directory)
    for model in models:
        model.check_conversion(codec)
    return codec


def _copy_files(directory: Path, copy: Path, kind: str | None) -> None:
    """Copy what transformers reads; `kind` replaces the tokenizer class."""
    for name, keys in _COPIED_KEYS.items():
        if is_inside(directory, name):
            content = read_object(inside(directory, name, GenerationError), GenerationError, MOST_CONFIG_BYTES)
            if kind is not None:
                content["tokenizer_class"] = kind
            (copy / name).write_text(json.dumps({key: content[key] for key in keys if key in content}), "utf-8")
    name = "added_tokens.json"
    if is_inside(directory, name):
        content = read_object(inside(directory, name, GenerationError), GenerationError, MOST_CONFIG_BYTES)
        (copy / name).write_text(json.dumps(content), "utf-8")
    for name in (*VOCABULARY_FILES, "merges.txt"):
        if is_inside(directory, name):
            (copy / name).write_bytes(read_bytes(inside(directory, name, GenerationError), GenerationError))


def _require_files(directory: Path, copy: Path, tokenizer: Any) -> None:
    """Raise GenerationError where the files of such a tokenizer's vocabulary are missing."""
    names = [name for name in type(tokenizer).vocab_files_names.values() if name != _FAST_FILE] or ["tokenizer.model"]
    for name in names:
        if not (copy / name).is_file():
            kind = printable(type(tokenizer).__name__)
            raise GenerationError(f"{directory}: no {name}, which holds the vocabulary of a {kind}; fetch it again")


def _check_vocabulary(directory: Path, tokenizer: Any) -> None:
    fast = tokenizer.backend_tokenizer
    check_vocabulary_size(directory, fast.get_vocab_size())
    expected = model_vocabulary_size(directory)
    for name in SPECIAL_TOKENS:
        text = getattr(tokenizer, name, None)
        if text is None:
            continue
        token = fast.token_to_id(str(text))
        if token is None or (expected and token >= expected):
            raise GenerationError(
                f"{directory}: {name} {shown(str(text))} is no token of its vocabulary; fetch it again"
            )
