"""The memory that a model takes, by rank, before anything is loaded: weights, the workspace of a step, the cache."""
