"""The widths of sparse multi-head latent attention: MLA over the tokens that a lightning indexer selects.

DeepSeek-V3.2-Exp (https://github.com/deepseek-ai/DeepSeek-V3.2-Exp, DSA) and GLM-5. Each query selects `index_topk`
earlier tokens by scores of small index queries and keys. A layer that is `full` has an indexer; a `shared` one attends
to the selection of the nearest full layer below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from ..errors import CheckpointError
from .config_reader import MAX_LAYERS, MAX_POSITIONS, ConfigReader, shown
from .mla import Mla

FULL, SHARED = "full", "shared"
GATHERED_NUMBERS: Final = 1 << 25
"""Numbers that attention to selected tokens gathers at a time."""
_LETTERS: Final = {"F": FULL, "S": SHARED}


@dataclass(frozen=True)
class Indexer:
    """The lightning indexer of a model.

    n_heads, head_dim: heads of an index query, and channels of a head; an index key has one head. topk: tokens that a
    query selects. rope_interleave: rotary pairs are channels (2i, 2i + 1), and not (i, i + rope / 2); the rotary
    channels come first. types: FULL or SHARED for each decoder layer. types_listed: config.json lists them layer by
    layer, so that shared layers have no indexer tensors; without the list they may have unused ones. scheduled: the
    types by all other keys; vLLM reads no list.
    """

    n_heads: int
    head_dim: int
    topk: int
    rope_interleave: bool
    types: tuple[str, ...]
    types_listed: bool
    scheduled: tuple[str, ...]

    def is_full(self, layer: int) -> bool:
        """True for a layer that selects by itself, as every multi-token-prediction layer does."""
        return layer >= len(self.types) or self.types[layer] == FULL


@dataclass(frozen=True)
class SparseMla(Mla):
    """Widths of multi-head latent attention over selected tokens; `q_lora_rank` is never None."""

    indexer: Indexer

    KEYS: ClassVar[Mapping[str, str]] = {**Mla.KEYS, "indexer": "indexer_types"}

    @property
    def indexer_types(self) -> tuple[str, ...]:
        """FULL or SHARED for each decoder layer."""
        return self.indexer.types

    def stated(self) -> dict[str, int | float | bool | str | None]:
        indexer = self.indexer
        pattern = "".join(word[0].upper() for word in indexer.types)
        return {
            "index_topk_pattern": pattern if indexer.scheduled != indexer.types else None,
            "index_n_heads": indexer.n_heads,
            "index_head_dim": indexer.head_dim,
            "index_topk": indexer.topk,
            "indexer_rope_interleave": indexer.rope_interleave,
        }

    @property
    def cache_scales(self) -> int:
        """0: sparse attention reads its cache in the compute dtype."""
        return 0

    @property
    def dense_tokens(self) -> int:
        return self.indexer.topk

    def takes_selection(self, layer: int) -> bool:
        return not self.indexer.is_full(layer)

    def numbers_held(self, tokens: int, length: int) -> int:
        """As `Mla.numbers_held`; samples longer than a selection attend in absorbed form to gathered tokens."""
        if length <= self.indexer.topk:
            return super().numbers_held(tokens, length)
        return tokens * (self.heads * (4 * self.qk_head_dim + 4 * self.kv_lora_rank) + 4 * length) + GATHERED_NUMBERS

    def sizes(self) -> dict[str, int]:
        indexer = self.indexer
        return {
            **super().sizes(),
            "index_q": indexer.n_heads * indexer.head_dim,
            "index_heads": indexer.n_heads,
            "index_head": indexer.head_dim,
        }

    def conditions(self, layer: int) -> dict[str, bool]:
        shared = not self.indexer.is_full(layer)
        return {
            **super().conditions(layer),
            "indexer": not (shared and self.indexer.types_listed),
            "unused_indexer": shared,
        }


@dataclass(frozen=True)
class SparseMlaDefaults:
    """Reads sparse MLA from config.json, with a family's defaults."""

    index_n_heads: int
    indexer_rope_interleave: bool
    index_head_dim: int = 128
    index_topk: int = 2048

    def read(self, read: ConfigReader) -> SparseMla:
        """Read the widths under Hugging Face's names; CheckpointError names a key that is missing or malformed."""
        mla = Mla.read(read)
        if mla.q_lora_rank is None:
            raise CheckpointError(
                "config.json: q_lora_rank is missing, and the indexer reads the latent of the queries"
            )
        layers = read.size("num_hidden_layers", most=MAX_LAYERS)
        listed, scheduled = _listed_types(read, layers), _scheduled_types(read, layers)
        indexer = Indexer(
            n_heads=read.size("index_n_heads", self.index_n_heads),
            head_dim=read.size("index_head_dim", self.index_head_dim),
            topk=read.size("index_topk", self.index_topk, most=MAX_POSITIONS),
            rope_interleave=read.flag("indexer_rope_interleave", self.indexer_rope_interleave),
            types=listed or scheduled,
            types_listed=listed is not None,
            scheduled=scheduled,
        )
        if indexer.types[0] != FULL:
            raise CheckpointError(
                "config.json: layer 0 shares the selected tokens of a layer below (indexer_types, index_topk_pattern "
                "or index_skip_topk_offset), and there is none; the first layer must be full"
            )
        if indexer.head_dim < mla.qk_rope_head_dim:
            raise CheckpointError(
                f"config.json: index_head_dim {indexer.head_dim} cannot hold the qk_rope_head_dim "
                f"{mla.qk_rope_head_dim} rotary channels of an index key"
            )
        return SparseMla(**vars(mla), indexer=indexer)


def _listed_types(read: ConfigReader, layers: int) -> tuple[str, ...] | None:
    """FULL or SHARED for each decoder layer, by `indexer_types`; None without it."""
    types = read.words("indexer_types")
    if types is None:
        return None
    _check_words("indexer_types", types, layers, (FULL, SHARED))
    return tuple(types)


def _scheduled_types(read: ConfigReader, layers: int) -> tuple[str, ...]:
    """FULL or SHARED for each decoder layer, by `index_topk_pattern`, else by frequency and offset.

    Precedence and defaults are those of transformers' `GlmMoeDsaConfig`, which takes `indexer_types` first.
    """
    pattern = read.text("index_topk_pattern")
    if pattern is not None:
        _check_words("index_topk_pattern", pattern, layers, tuple(_LETTERS))
        return tuple(_LETTERS[letter] for letter in pattern)
    frequency, offset = read.size("index_topk_freq", 1), read.count("index_skip_topk_offset", 2)
    return tuple(SHARED if max(layer - offset + 1, 0) % frequency else FULL for layer in range(layers))


def _check_words(key: str, words: list[str] | str, layers: int, known: tuple[str, ...]) -> None:
    wrong = next((word for word in words if word not in known), None)
    if wrong is not None:
        raise CheckpointError(f"config.json: {key} has {shown(wrong)}; npuq knows {' and '.join(known)}")
    if len(words) != layers:
        raise CheckpointError(
            f"config.json: {key} is for {len(words)} layers, and num_hidden_layers is {layers}; config.json is damaged "
            "or two models'"
        )
