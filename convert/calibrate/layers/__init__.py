"""One decoder layer, calibrated: its attention, its feed-forward block, its linears."""
