"""Sources of weights: one class for each stored form, all behind the protocol of `weights.py`, which also says how to
add a form. `opening.py` detects a checkpoint's forms."""
