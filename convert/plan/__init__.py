"""Decisions before the work: recipe, memory, jobs, and the place of every output byte."""
