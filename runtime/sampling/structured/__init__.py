"""Structured output: grammars compiled by llguidance, and what decides where in a reply they begin.

Only `compiler.py` imports llguidance, which `npuq[serve]` installs.
"""
