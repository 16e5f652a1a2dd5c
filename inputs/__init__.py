"""What comes from outside (files, JSON, YAML, patterns, names), checked where it enters: one guarded reader a kind.

Nothing here imports another room. Every reader takes the error class that its caller wants raised, and raises nothing
else: one line that names the file and the remedy.
"""
