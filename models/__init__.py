"""Models: their config, the tensors of each family with roles and shapes, their rotary tables."""
