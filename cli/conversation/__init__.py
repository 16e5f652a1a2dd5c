"""A conversation in the terminal: its messages, its commands, and the two kinds of models that answer (in this process,
or behind a server's URL)."""
