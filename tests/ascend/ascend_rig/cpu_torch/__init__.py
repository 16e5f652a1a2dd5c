"""A CPU build of any torch release, made of the wheel that PyPI has: torch_npu aborts beside a CUDA build.

`wheel` unpacks it without CUDA's kernels, `cuda_standins` builds small libraries in their place.
"""
