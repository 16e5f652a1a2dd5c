"""The Hugging Face hub, through huggingface_hub: commits, LFS, pull requests, and the cache that other tools share."""
