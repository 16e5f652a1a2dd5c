"""Text to token ids and back: tokenizer files, chat templates, what is given out of a text that grows.

Nothing here knows the model; files of a checkpoint are read with limits.
"""
