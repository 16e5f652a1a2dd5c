"""Decode steps as captured graphs: their sizes, their inputs, and when a step is one."""
