"""The native kernels (C, with the interface npuq.h) and their one Python binding."""
