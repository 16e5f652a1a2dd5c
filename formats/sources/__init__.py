"""What weights are read from: one class for each form in which a checkpoint stores a weight, all behind the protocol of
`weights.py`, which also says how another form is added. `opening.py` finds out which forms a checkpoint has."""
