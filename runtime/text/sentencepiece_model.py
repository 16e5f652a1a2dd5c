"""SentencePiece models: what is safe to convert, and whether a conversion encodes as SentencePiece itself does.

transformers converts byte-pair models without a table of replacements exactly. Of others it drops what it does not
know, and then encodes otherwise without a word.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from ...errors import GenerationError
from ...inputs.files import read_bytes
from ...inputs.printable import shown
from .codec import FastCodec, guarded

NAMES: Final = ("tokenizer.model", "spiece.model")
_BYTE_PAIR: Final = 2  # TrainerSpec.ModelType.BPE
_MOST_BYTES: Final = 32 << 20
_MOST_PIECES: Final = 1 << 20
# The longest of known models are runs of spaces. A conversion takes time with the square of it.
_MOST_PIECE_BYTES: Final = 512

# None begins with a space: transformers gives that one a prefix or not, by tokenizer_config.json's `legacy`.
_PROBES: Final = (
    "The quick brown fox jumps over the lazy dog.",
    "It's 1234567 + 3.14 = ?!  two  spaces, a\ttab\nand\n\n  lines \r\n ",
    "def f(x):\n    return {'a': [x**2, ...]}  # naïve café Ωmega",
    "Все люди равны. 人人生而自由，在尊严和权利上一律平等。 すべての人間は 모든 인간은",
    "كل الناس सभी मनुष्य ทุกคน 🐋👩‍👩‍👧 ﬁ ½ Å e\u0301 \u3000\u00a0ＡＢＣ",
)


class SentencePieceModel:
    """A SentencePiece model in its own library, as the reference of its conversion.

    Raises GenerationError for a file that is none, for one that normalizes texts by a table, which can abort the
    tokenizers library, and where the packages are missing.
    """

    def __init__(self, path: Path):
        self._path = path
        content = read_bytes(path, GenerationError, _MOST_BYTES)
        try:
            library = import_module("sentencepiece")
            messages = import_module("sentencepiece.sentencepiece_model_pb2")  # needs protobuf
        except ImportError:
            raise GenerationError(
                f"{path}: install sentencepiece and protobuf to read it, or put the model's tokenizer.json there"
            ) from None
        doing = f"{path}: is no SentencePiece model; fetch it again, or put the model's tokenizer.json there"
        proto = guarded(lambda: messages.ModelProto.FromString(content), doing)
        self._check(proto, doing)
        self._processor: Any = guarded(lambda: library.SentencePieceProcessor(model_proto=content), doing)

    def _check(self, proto: Any, doing: str) -> None:
        if proto.normalizer_spec.precompiled_charsmap:
            raise GenerationError(
                f"{self._path}: it normalizes texts by a table, which npuq does not read; put the model's "
                "tokenizer.json there"
            )
        if not proto.pieces:
            raise GenerationError(doing)
        if proto.trainer_spec.model_type != _BYTE_PAIR:
            # Of a unigram model's segmentations that are equally likely, the two libraries may take different ones.
            raise GenerationError(
                f"{self._path}: npuq reads byte-pair models, and this is another kind; put the model's tokenizer.json "
                "there"
            )
        if len(proto.pieces) > _MOST_PIECES:
            raise GenerationError(f"{self._path}: has {len(proto.pieces)} pieces; npuq reads up to {_MOST_PIECES}")
        for number, piece in enumerate(proto.pieces):
            if not isinstance(piece.piece, str):  # protobuf gives bytes that are no UTF-8 as such
                raise GenerationError(doing)
            if len(piece.piece.encode()) > _MOST_PIECE_BYTES:
                raise GenerationError(
                    f"{self._path}: piece {number} is longer than the {_MOST_PIECE_BYTES} bytes that npuq reads"
                )

    def check_conversion(self, codec: FastCodec) -> None:
        """Raise GenerationError where a conversion gives some text other ids, or some ids another text."""
        for text in _PROBES:
            ids, back = guarded(partial(self._encoded, text), f"{self._path}: fails to encode")
            if codec.encode(text, special=False) != ids or codec.decode(ids) != back:
                raise GenerationError(
                    f"{self._path}: transformers does not convert it exactly ({shown(text, 24)} gets other tokens); "
                    "put the model's tokenizer.json there"
                )

    def _encoded(self, text: str) -> tuple[list[int], str]:
        ids = list(self._processor.encode(text))
        return ids, self._processor.decode(ids)
