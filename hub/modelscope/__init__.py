"""ModelScope, through the public methods of its client (modelscope_hub), which commits every file by itself."""
