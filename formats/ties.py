"""Embedding and head as one stored tensor: how a checkpoint with tied embeddings is read."""

from __future__ import annotations

from dataclasses import replace

from ..models.families import family_of
from ..models.family import Block, Family
from .checkpoint import Checkpoint, natural_key


def tied_names(family: Family) -> tuple[str, str]:
    """The names of embedding and head."""
    return family.name(Block.TOP, "embedding"), family.name(Block.TOP, "head")


def share_tied(checkpoint: Checkpoint) -> str | None:
    """Give the one stored tensor of a tied pair its other name too; that name, or None where nothing was missing.

    Whoever reads afterwards finds both. Where config.json ties a pair of which both are stored, each is what is stored
    for it: transformers, too, unties a pair that differs.
    """
    if checkpoint.config.get("tie_word_embeddings") is not True:
        return None
    tensors = checkpoint.tensors
    embedding, head = tied_names(family_of(checkpoint.config.get("model_type")))
    for missing, stored in ((head, embedding), (embedding, head)):
        if stored in tensors and missing not in tensors:
            both = tensors | {missing: replace(tensors[stored], name=missing)}
            # In place: what reads a checkpoint on a hub holds the same dictionary.
            tensors.clear()
            tensors.update({name: both[name] for name in sorted(both, key=natural_key)})
            return missing
    return None
