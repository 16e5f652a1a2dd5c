"""Attention on torch_npu: its weights, the paged cache, and the sizes that its operators take (`limits.py`)."""
