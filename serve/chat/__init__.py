"""`POST /v1/chat/completions`: a conversation comes in, the model's next message goes out.

`request.py` has the body, `messages.py` and `tools.py` turn its parts into the runtime's, `conversations.py` makes
prompt and grammar, `documents.py` the answer, and `endpoint.py` does one after the other.
"""
