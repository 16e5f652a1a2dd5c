"""npuq."""
