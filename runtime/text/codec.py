"""Text to token ids and back: what every kind of tokenizer file offers, and `tokenizer.json`'s implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol, TypeVar

from tokenizers import Tokenizer as FastTokenizer

from ...errors import GenerationError
from ...inputs.printable import error_line
from .token_bytes import TokenBytes
from .tokenizer_parts import check_growth, check_parts

_T = TypeVar("_T")


class Codec(Protocol):
    """A vocabulary with its rules. May be used by several threads.

    special_ids: token ids of special tokens by their text. Decoded text leaves them out. sorts_tools: chat templates
    get the tools of a request with their keys in order, as by the model's own code.
    """

    sorts_tools: bool

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""

    @property
    def special_ids(self) -> Mapping[str, int]: ...

    def token_id(self, token: str) -> int | None:
        """Id of the token with that text; None if there is none."""

    def encode(self, text: str, special: bool) -> list[int]:
        """Token ids of a text; `special` adds the special tokens that the vocabulary's own rules put around it.

        Special tokens within the text are encoded as such. Raises GenerationError.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids. Special tokens and unknown ids have none; bytes that are no UTF-8 become U+FFFD."""

    def token_bytes(self, id: int) -> bytes:
        """Bytes that a token stands for, also part of a character; of a special token its name; b"" for unknown ids."""


_SHORT: Final = 8192
"""Characters of a text that are encoded in some milliseconds."""


class FastCodec:
    """A `tokenizer.json` in the `tokenizers` library. Raises GenerationError for content that cannot be read safely."""

    sorts_tools = False

    def __init__(self, content: bytes, path: Path):
        check_parts(content, path)
        fast = guarded(lambda: FastTokenizer.from_buffer(content), f"{path}: cannot be read as a tokenizer")
        check_growth(fast, path)
        # Settings of training that stay in the file: they would truncate or pad prompts silently.
        fast.no_truncation()
        fast.no_padding()
        self._fast = fast
        self._bytes = guarded(lambda: TokenBytes(fast), f"{path}: cannot be read as a tokenizer")
        added = fast.get_added_tokens_decoder()
        self.special_ids = {token.content: id for id, token in added.items() if token.special and token.content}

    @property
    def vocab_size(self) -> int:
        return self._fast.get_vocab_size()

    def token_id(self, token: str) -> int | None:
        return self._fast.token_to_id(token)

    def encode(self, text: str, special: bool) -> list[int]:
        return guarded(lambda: self._ids(text, special), "the tokenizer fails to encode")

    def _ids(self, text: str, special: bool) -> list[int]:
        if len(text) <= _SHORT:
            return list(self._fast.encode(text, add_special_tokens=special).ids)
        # The library's other call holds Python's lock, so that all threads would stand still for seconds.
        return list(self._fast.encode_batch_fast([text], add_special_tokens=special)[0].ids)

    def token_bytes(self, id: int) -> bytes:
        return guarded(lambda: self._bytes.of(id), "the tokenizer fails to decode")

    def decode(self, ids: Sequence[int]) -> str:
        return guarded(
            lambda: str(self._fast.decode(list(ids), skip_special_tokens=True)), "the tokenizer fails to decode"
        )


def guarded(call: Callable[[], _T], doing: str) -> _T:
    """Call into a tokenizer library, with its failures as GenerationError.

    The tokenizers library raises plain Exception for all its errors. For a panic of its code, either library raises a
    BaseException, which `except Exception` does not catch.
    """
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError, GenerationError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = error_line(error, 120)
        raise GenerationError(f"{doing}: {reason}") from error
