"""`POST /v1/completions`: a prompt, or several, continued.

`request.py` has the body and its prompts, `documents.py` the answer, and `endpoint.py` does one after the other.
"""
