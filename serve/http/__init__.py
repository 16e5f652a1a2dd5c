"""HTTP: connections, who may call, bodies that come in, JSON and errors that go out. Nothing here knows of a model.

`protocol.py` holds a connection, `access.py` lets a request in, `bodies.py` reads what it sends, `documents.py` and
`errors.py` have what it gets.
"""
