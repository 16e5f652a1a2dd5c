"""The files of a finished conversion beside its shards: card, totals, description, manifest."""
