"""The two operators of `device/ops.py` as Triton kernels, for GPUs. Only modules that hold a kernel import Triton."""
