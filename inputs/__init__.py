"""Guarded readers of input from outside, one a kind: files, JSON, YAML, patterns, names.

Nothing here imports another folder. Every reader raises only the error class that its caller passes, with one line that
names the file and the remedy.
"""
