"""The rig with several ranks: a process a rank, exchange operators over gloo, and jobs that run in all processes."""
