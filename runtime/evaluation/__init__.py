"""Evaluation beside the float source: perplexity, divergence, and the error at the output of every layer."""
