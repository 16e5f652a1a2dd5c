"""The self-test of a backend: every operator against the reference."""
