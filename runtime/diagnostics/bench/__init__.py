"""Time of a decode step and of its operators, against the bytes that they move."""
