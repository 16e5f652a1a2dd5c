"""What a model is: its config, the tensors of each family with their roles and shapes, its rotary tables."""
