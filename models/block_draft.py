"""DSpark: a draft of several layers that proposes a block of tokens at a time (DeepSeek-V4-Flash-0731).

Its layers have the names of multi-token-prediction layers, and other tensors beside a decoder layer's. The first reads
hidden states of some of the main model's layers. The last has a head that adds a bias of low rank for the token before
(a Markov chain), and one for the confidence in each token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol

from ..errors import CheckpointError
from .config_reader import MAX_LAYERS, ConfigReader

_TARGETS: Final = "dspark_target_layer_ids"


@dataclass(frozen=True)
class BlockDraft:
    """The widths of such a draft.

    layers: of the draft. dspark_target_layer_ids: layers of the main model whose hidden states it reads.
    dspark_markov_rank: channels of the bias for the token before.
    """

    layers: int
    dspark_target_layer_ids: tuple[int, ...]
    dspark_markov_rank: int

    # Words of `Entry.when` that it decides, in a config without one too → the key of config.json.
    KEYS: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("serial_draft", "block_draft_start", "draft_end", "block_draft_end"), _TARGETS
    )

    @classmethod
    def read(cls, read: ConfigReader) -> BlockDraft | None:
        """Read the keys; None in a config without them. CheckpointError names a key that is malformed."""
        main = read.size("num_hidden_layers", most=MAX_LAYERS)
        targets = read.numbers(_TARGETS, main - 1)
        if not targets:
            return None
        # SGLang has a layer for each target, vLLM-Ascend as many as these keys say, three without them.
        for key in ("n_mtp_layers", "dspark_num_mtp_layers"):
            if read.count(key, len(targets), most=MAX_LAYERS) != len(targets):
                raise CheckpointError(
                    f"config.json: {key} differs from the {len(targets)} {_TARGETS}: engines read one or the other as "
                    "the number of the draft's layers, and both have it in every release"
                )
        return cls(len(targets), tuple(targets), read.size("dspark_markov_rank"))

    def sizes(self, hidden: int) -> dict[str, int]:
        """Words of a table's shapes."""
        return {
            "targets_hidden": len(self.dspark_target_layer_ids) * hidden,
            "markov": self.dspark_markov_rank,
            "confidence": hidden + self.dspark_markov_rank,
        }

    def conditions(self, layer: int) -> dict[str, bool]:
        """Words of conditions, of layer `layer` of the draft."""
        last = layer == self.layers - 1
        return {"block_draft_start": layer == 0, "block_draft_end": last, "draft_end": last}


class BlockDraftReader(Protocol):
    """Reads a family's draft from config.json: a column of the family."""

    def read(self, read: ConfigReader) -> BlockDraft | None:
        """Read the keys; CheckpointError names a key that is malformed."""


def draft_conditions(draft: BlockDraft | None, layer: int) -> dict[str, bool]:
    """Words of conditions of a draft's layer `layer`, below 0 outside; without a `BlockDraft` each is serial."""
    if layer < 0:
        return {}
    return {"serial_draft": True, "draft_end": True} if draft is None else draft.conditions(layer)


def draft_key(draft: BlockDraft | None, word: str) -> tuple[str, Any] | None:
    """The key of config.json that decides a word, and its value; None for any other word."""
    key = BlockDraft.KEYS.get(word)
    return None if key is None else (key, None if draft is None else list(getattr(draft, key)))
