"""The operator set on torch_npu (`operators.py`), and what it needs around it (`support.py`)."""
