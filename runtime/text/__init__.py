"""Text to token ids and back: tokenizer files, chat templates, streaming of decoded text.

Independent of the model. Files of a checkpoint are read with limits.
"""
