"""The front door: one click command a file, imported only when it is called, so that `--help` needs no torch."""
