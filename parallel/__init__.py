"""Threads: started, counted and ended so that no interruption leaves one behind."""
