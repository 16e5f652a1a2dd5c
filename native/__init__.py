"""The native kernels (C, behind the plain interface of npuq.h) and the one Python binding to them."""
