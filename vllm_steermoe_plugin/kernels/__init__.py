"""The two operators of `ops.py` as Triton kernels, for GPUs. Only modules that hold a kernel import Triton."""
