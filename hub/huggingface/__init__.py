"""The Hugging Face hub, by huggingface_hub: commits, LFS, pull requests, and the cache shared with other tools."""
