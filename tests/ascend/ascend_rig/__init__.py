"""The Ascend rig: the real torch_npu on stand-in CANN libraries, its operators given reference semantics on the CPU.

`standins` and `install` set it up; `semantics` and its neighbours run only inside the subprocess where torch_npu imports.
"""
