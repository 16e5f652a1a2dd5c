"""Attention kinds, one file each: which pools a kind's cache has, how its weights load, how it writes and attends.

`pools.py` is the paged cache that all kinds share; the operators that a kind is made of are each backend's
(`runtime/ops/`).
"""
