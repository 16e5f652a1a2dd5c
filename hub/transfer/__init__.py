"""Bytes on their way: tried again after faults, resumed inside files, checked by hash, in bounded space.

Knows hubs by the protocols of `hub/hub.py` alone.
"""
