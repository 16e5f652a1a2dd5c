"""Tied embeddings: embedding and head as one stored tensor."""

from __future__ import annotations

from dataclasses import replace

from ...models.families import family_of
from ...models.family import Family
from ..checkpoint import Checkpoint, natural_key


def tied_names(family: Family) -> tuple[str, str]:
    """The tensor names of embedding and head."""
    return family.top_name("embedding"), family.top_name("head")


def share_tied(checkpoint: Checkpoint) -> str | None:
    """Enter the one stored tensor of a tied pair under its second name too; returns that name, None if none was
    missing.

    Later readers find both names. Where both tensors of a tied pair are stored, each keeps its own values: transformers
    also unties a pair that differs.
    """
    if checkpoint.text_config.get("tie_word_embeddings") is not True:
        return None
    tensors = checkpoint.tensors
    embedding, head = tied_names(family_of(checkpoint.config.get("model_type")))
    for missing, stored in ((head, embedding), (embedding, head)):
        if stored in tensors and missing not in tensors:
            both = tensors | {missing: replace(tensors[stored], name=missing)}
            # In place: the window of a remote checkpoint holds the same dictionary.
            tensors.clear()
            tensors.update({name: both[name] for name in sorted(both, key=natural_key)})
            return missing
    return None
