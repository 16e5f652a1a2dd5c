"""The server: requests of OpenAI's protocol come in over HTTP, the runtime's tokens go out as JSON and event streams.

The way of a request: `http/` takes it, an endpoint (`completions/`, `chat/`) makes prompts and parameters of it,
`service.py` admits it, `engine_thread.py` runs it, `reply.py` says what the endpoint makes of the pieces, and
`responding.py` writes that, as one document or as a stream.
"""
