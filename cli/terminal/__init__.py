"""What commands say and ask at the terminal: sizes, lines, JSON documents, progress."""
