"""A checkpoint goes in, an artifact comes out. `convert_checkpoint` makes one, resumably and in bounded memory;
`verify` checks one against everything its loaders need; `inspect` says what is in one. Nothing here runs a model."""

from .conversion import Summary, convert_checkpoint

__all__ = ["Summary", "convert_checkpoint"]
