"""A walk over ranks: each computes some batches, rows and experts, and every rank gets all results in one order."""
