"""One model over several processes: ranks, which exchange rows, and the steps that rank 0 tells the others."""
