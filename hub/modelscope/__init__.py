"""ModelScope, by the public methods of its client (modelscope_hub), which makes one commit a file."""
