"""The Ascend rig: the real torch_npu on stand-in CANN libraries, its operators given reference semantics on the CPU.

`standins` and `install` set it up; the other modules run only inside the subprocess where torch_npu imports.
"""
