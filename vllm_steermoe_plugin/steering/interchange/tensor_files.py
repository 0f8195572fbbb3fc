"""A matrix of numbers from a `.npy` or `.safetensors` file. Neither pickles nor Python literals are evaluated."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from expert_registry.errors import UsageError
from expert_registry.files import read_bounded

MAX_CELLS = 1 << 18
"""Rows times columns: 512 layers of 512 experts."""
_MAX_HEADER = 1 << 14
_NPY = re.compile(
    rb"\{'descr':'([<>]f[248])','fortran_order':(True|False),'shape':\(([0-9]{1,9}),([0-9]{1,9}),?\),?\}", re.ASCII
)
_NPY_LENGTH = {b"\x01\x00": "<H", b"\x02\x00": "<I", b"\x03\x00": "<I"}
_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}

Matrix = NDArray[np.floating[Any]]


def read_matrix(path: Path) -> Matrix:
    """The matrix in a file, in the precision in which it stands there.

    Raises:
        FileError: it cannot be read or is too large.
        UsageError: it is no matrix of float16, float32 or float64, or one of its numbers is not finite.
    """
    readers = {".npy": _read_npy, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise UsageError(f"{path}: a matrix is read from .npy or .safetensors")
    matrix = readers[path.suffix](read_bounded(path, 8 * MAX_CELLS + _MAX_HEADER), str(path))
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0].tolist()
        raise UsageError(f"{path}: the number in row {row}, column {column} is {matrix[row, column]}")
    return matrix


def _read_npy(data: bytes, name: str) -> Matrix:
    length = _NPY_LENGTH.get(data[6:8])
    if data[:6] != b"\x93NUMPY" or length is None or len(data) < 12:
        raise UsageError(f"{name} is not a .npy file")
    start = 8 + struct.calcsize(length)
    (size,) = struct.unpack(length, data[8:start])
    end = start + min(size, _MAX_HEADER)
    header = re.sub(rb"\s+", b"", data[start:end])
    match = _NPY.fullmatch(header)
    if match is None:
        raise UsageError(f"{name} must hold one matrix of float16, float32 or float64; it holds {header!r:.200}")
    shape = (int(match[3]), int(match[4]))
    return _array(data[end:], match[1].decode(), shape, name, "F" if match[2] == b"True" else "C")


def _read_safetensors(data: bytes, name: str) -> Matrix:
    try:
        tensors = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise UsageError(f"{name} is not a safetensors file: {error}") from None
    if len(tensors) != 1:
        raise UsageError(f"{name} must hold one tensor, the matrix; it holds {len(tensors)}")
    key, tensor = tensors[0]
    if tensor["dtype"] not in _DTYPES:
        raise UsageError(f"{name}: {key:.80} must be float16, float32 or float64, got {tensor['dtype']}")
    return _array(bytes(tensor["data"]), _DTYPES[tensor["dtype"]], tuple(tensor["shape"]), name)


def _array(data: bytes, dtype: str, shape: tuple[int, ...], name: str, order: str = "C") -> Matrix:
    if len(shape) != 2 or not 0 < math.prod(shape) <= MAX_CELLS:
        raise UsageError(f"{name} must hold a matrix of 1 to {MAX_CELLS} numbers, got the shape {list(shape)}")
    wanted = math.prod(shape) * np.dtype(dtype).itemsize
    if len(data) != wanted:
        raise UsageError(f"{name}: {len(data)} bytes of numbers for the shape {list(shape)}, which takes {wanted}")
    flat = np.frombuffer(data, dtype=dtype)
    return flat.reshape(shape) if order == "C" else flat.reshape(shape[::-1]).T
