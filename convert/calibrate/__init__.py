"""Calibrated conversion: a model's layers are walked with real text, each quantized for the inputs it will have."""
