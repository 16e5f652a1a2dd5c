"""Runs the loading code of vLLM-Ascend and SGLang on this machine, rank by rank, without an NPU."""
