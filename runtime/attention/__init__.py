"""Kinds of attention, one file each: the pools of its cache, loading its weights, writing the cache, attending.

`pools.py` is the paged cache that all kinds share. The operators are those of each backend (`runtime/ops/`).
"""
