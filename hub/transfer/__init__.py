"""Transfers: retried after faults, resumed inside files, checked by hash, in bounded space.

Uses hubs by the protocols of `hub/hub.py` alone.
"""
