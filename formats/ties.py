"""Embedding and head as one stored tensor: how a checkpoint with tied embeddings is read."""

from __future__ import annotations

from dataclasses import replace

from .checkpoint import Checkpoint, natural_key

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def share_tied(checkpoint: Checkpoint) -> str | None:
    """Give the one stored tensor of a tied pair its other name too; that name, or None where nothing was missing.

    Whoever reads afterwards finds both. Where config.json ties a pair of which both are stored, each is what is stored
    for it: transformers, too, unties a pair that differs.
    """
    if checkpoint.config.get("tie_word_embeddings") is not True:
        return None
    tensors = checkpoint.tensors
    for missing, stored in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
        if stored in tensors and missing not in tensors:
            both = tensors | {missing: replace(tensors[stored], name=missing)}
            # In place: what reads a checkpoint on a hub holds the same dictionary.
            tensors.clear()
            tensors.update({name: both[name] for name in sorted(both, key=natural_key)})
            return missing
    return None
