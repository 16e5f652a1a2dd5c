"""What a model's reply is made of: reasoning, content and tool calls, told apart token by token.

`formats.py` has a table of the ways models write them and finds a model's own. `reply.py` is the state machine; it
reads markers (`markers.py`), calls (`calls.py`) and stop strings, and gives parts (`parts.py`).
"""
