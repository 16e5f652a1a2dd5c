"""Input and output of commands at the terminal: sizes, lines, JSON documents, progress."""
