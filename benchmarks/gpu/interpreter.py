"""Triton's interpreter on a machine without a GPU, with bfloat16 rounded as a GPU rounds it.

The interpreter keeps bfloat16 as bits and cuts off what does not fit, where hardware rounds to the nearest even
(`cvt.rn`). The margins of the rewrite depend on rounding, so the two conversions are replaced.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np


def use_interpreter() -> None:
    """Have kernels interpreted; call before any module that holds a kernel is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    original: Callable[..., Any] = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if (source, target) == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(round_to_bfloat16(src.data), target)
        if (source, target) == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), target)
        return original(self, src, dst_type)

    interpreter.InterpreterBuilder.cast_impl = cast_impl
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(interpreter.InterpreterBuilder, name, cast_impl)


def round_to_bfloat16(x: Any) -> Any:
    """Bits uint16 of the bfloat16 nearest to float32 `x`, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(np.shape(x))
