"""What lies on disk: safetensors, checkpoints and artifacts, schemes and their packing, side files; `sources/` reads
weights in whatever form they are stored."""
