"""A step as one graph of torch_npu."""
