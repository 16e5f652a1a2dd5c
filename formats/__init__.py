"""Formats on disk: safetensors, checkpoints and artifacts, schemes and their packing, side files. `sources/` reads
weights in every stored form that npuq knows."""
