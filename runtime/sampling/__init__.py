"""Sampling: a row of logits and the parameters of a request go in, the next token comes out.

`params.py` has what a request says, `sampler.py` the order of things, and a file each the rest: `rows.py` the logits,
`adjustments.py` what changes them, `filters.py` what narrows them, `draw.py` the choice at random, `noise.py` its random
numbers, `logprobs.py` what is reported, `grammar.py` the hook for structured output.
"""
