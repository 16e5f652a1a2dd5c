"""Protocols of a family's attention: what reads its widths from config.json, and what the widths tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from .config_reader import ConfigReader


class AttentionWidths(Protocol):
    """The widths of one kind of attention: a field of the config.

    KEYS: the field, named as its key of config.json, that decides a word of `conditions`.
    """

    KEYS: ClassVar[Mapping[str, str]]

    @property
    def heads(self) -> int:
        """Query heads, which tensor-parallel ranks split."""

    @property
    def kv_heads(self) -> int:
        """Heads of the KV cache, which tensor-parallel ranks split, or hold several times: 1 for a latent."""

    @property
    def qk_head_dim(self) -> int:
        """Channels of one head's query and key."""

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""

    @property
    def rotary_interleaved(self) -> bool:
        """True where the pairs that rotate together are stored side by side: channels (2i, 2i + 1). False: channels
        (i, i + rotary_dim / 2)."""

    @property
    def rotary_temperature(self) -> bool:
        """True where mscale and mscale_all_dim of YaRN's parameters have a meaning, as in DeepSeek's models."""

    @property
    def cache_scales(self) -> int:
        """Scales of a layer's int8 KV cache; 0 where it cannot have one."""

    @property
    def attended_products(self) -> int:
        """Products that one query and one key take: a score of each head, and its value."""

    @property
    def dense_tokens(self) -> int | None:
        """The longest sequence in which every query attends to all earlier tokens; None: any."""

    def stated(self) -> Mapping[str, Any]:
        """Keys of config.json that some loader reads otherwise, with the values that all read alike; None: any."""

    def sizes(self) -> Mapping[str, int]:
        """The table's words of shapes, as numbers."""

    def layer_sizes(self, layer: int) -> Mapping[str, int]:
        """The words whose number is a layer's own."""

    def conditions(self, layer: int) -> Mapping[str, bool]:
        """The table's words of conditions; True for those that hold in a layer."""

    def takes_selection(self, layer: int) -> bool:
        """True for a layer that attends to the tokens that a layer below selected."""

    def numbers_held(self, tokens: int, length: int) -> int:
        """Numbers that attention holds at once for `tokens` tokens, in slices of `length`."""


class AttentionReader(Protocol):
    """Reads the widths of a family's attention: a column of the family."""

    def read(self, read: ConfigReader) -> AttentionWidths:
        """Read the widths under Hugging Face's names; CheckpointError names a key that is missing or malformed."""
