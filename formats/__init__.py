"""What lies on disk: safetensors, checkpoints and their dialects, schemes and their packing, artifacts, side files."""
