"""Operators on torch_npu (`operators.py`), and checks of torch_npu, CANN and the chip (`support.py`)."""
