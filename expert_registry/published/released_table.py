"""Routing counts from the tables of the authors' release (adobe-research/SteerMoE).

A table is a pickled pandas DataFrame with one row per expert. There are two schemas, with 11 and with 31
columns; the counts stand in the columns that both have:

    layer, expert     index of the layer (all layers have routed experts) and of the expert in it
    a1, a2            tokens of side 1 and side 2 that selected the expert
    d1, d2            tokens that did not
    risk_diff         a1 / (a1 + d1) - a2 / (a2 + d2)

pandas is not needed: `pickle_tree` gives the pickle as inert data, of which only arrays of numbers are used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from expert_registry.counts import RoutingCounts
from expert_registry.errors import RankingFormatError
from expert_registry.published.pickle_tree import Call, Name, PickleRefusedError, read_tree
from expert_registry.shape import MoEShape

_FRAME = Name("pandas.core.frame", "DataFrame")
_MANAGER = Name("pandas.core.internals.managers", "BlockManager")
_BLOCK = Name("pandas._libs.internals", "_unpickle_block")
_NUMBERS = Name("numpy._core.numeric", "_frombuffer")
_DTYPE = Name("numpy", "dtype")
_OBJECTS = Name("numpy._core.multiarray", "_reconstruct")
_SLICE = Name("builtins", "slice")
_NEW_INDEX = Name("pandas.core.indexes.base", "_new_Index")
NAMES = frozenset(
    {
        *(_FRAME, _MANAGER, _BLOCK, _NUMBERS, _DTYPE, _OBJECTS, _SLICE, _NEW_INDEX),
        Name("numpy", "ndarray"),
        Name("pandas.core.indexes.base", "Index"),
        Name("pandas.core.indexes.range", "RangeIndex"),
    }
)
"""All that the released files name. None of it is ever looked up."""

_COLUMNS = ("layer", "expert", "a1", "a2", "d1", "d2", "risk_diff")
_TOLERANCE = 1e-9
"""Between a table's risk difference and that of its counts: far below one token, far above rounding."""


def read_released_table(data: bytes, shape: MoEShape) -> RoutingCounts:
    """The routing counts in a released table.

    Args:
        data: bytes of the pickle.
        shape: of the model that was counted; the table must have one row for each of its experts.

    Raises:
        PickleRefusedError: the pickle holds anything but such a table.
        RankingFormatError: the counts in it are impossible.
    """
    columns = _columns(read_tree(data, NAMES), len(shape.layers) * shape.num_experts)
    missing = [name for name in _COLUMNS if name not in columns]
    if missing:
        raise PickleRefusedError(f"the table has no column {missing[0]!r} of numbers")
    numbers = {name: _whole(columns[name], name) for name in _COLUMNS if name != "risk_diff"}
    return _counts(numbers, columns["risk_diff"], shape)


def _counts(
    numbers: dict[str, NDArray[np.int64]], risk_difference: NDArray[np.float64], shape: MoEShape
) -> RoutingCounts:
    experts = shape.num_experts
    layer, expert = numbers["layer"], numbers["expert"]
    if shape.layers != tuple(range(len(shape.layers))):
        raise RankingFormatError(f"released tables count all layers of a model, but this one is {shape}")
    if layer.min() < 0 or layer.max() >= len(shape.layers) or expert.min() < 0 or expert.max() >= experts:
        raise RankingFormatError(f"the table has a layer or expert that {shape} has not")
    cell = layer * experts + expert
    if len(np.unique(cell)) != len(cell):
        raise RankingFormatError("the table has two rows for one expert")
    sides, tokens = [], []
    for side in "12":
        totals = np.unique(numbers[f"a{side}"] + numbers[f"d{side}"])
        if len(totals) != 1:
            raise RankingFormatError(f"side {side} of the table has other numbers of tokens for other experts")
        grid = np.empty(len(cell), dtype=np.int64)
        grid[cell] = numbers[f"a{side}"]
        sides.append(grid.reshape(len(shape.layers), experts))
        tokens.append(int(totals[0]))
    layers = np.asarray(shape.layers, dtype=np.int64)
    counts = RoutingCounts(sides[0], sides[1], np.asarray(tokens, dtype=np.int64), layers)
    counts.check(shape)
    if not np.allclose(risk_difference, counts.risk_difference().flat[cell], rtol=0, atol=_TOLERANCE):
        raise RankingFormatError("the table's risk differences are not those of its counts")
    return counts


def _whole(values: NDArray[Any], name: str) -> NDArray[np.int64]:
    """Counts are stored as floating-point numbers in the release; they must be whole all the same."""
    if values.dtype == np.int64:
        return values
    if not (np.isfinite(values).all() and (values == np.rint(values)).all() and (abs(values) < 1 << 50).all()):
        raise RankingFormatError(f"column {name!r} of the table holds numbers that are no counts")
    return values.astype(np.int64)


def _columns(tree: Any, rows: int) -> dict[str, NDArray[Any]]:
    """The table's columns of numbers, each of shape `[rows]`."""
    frame = _call(tree, _FRAME, 0)
    if not isinstance(frame.state, dict):
        raise PickleRefusedError("the pickled table has no content")
    blocks, axes = _call(frame.state.get("_mgr"), _MANAGER, 2).arguments
    if not (isinstance(blocks, tuple) and isinstance(axes, list) and len(axes) == 2):
        raise PickleRefusedError("the pickled table has no columns and rows")
    names = _column_names(axes[0])
    columns: dict[str, NDArray[Any]] = {}
    for block in blocks:
        values, placement, _ = _call(block, _BLOCK, 3).arguments
        if isinstance(values, Call) and values.function == _OBJECTS:
            continue  # a column of texts, such as labels for plots
        array, places = _array(values, 2), _places(placement, len(names))
        if array.shape != (len(places), rows):
            raise PickleRefusedError(f"{array.shape} numbers in the table, but the model needs {len(places), rows}")
        for place, row in zip(places, array, strict=True):
            if names[place] in columns:
                raise PickleRefusedError(f"the table has two columns {names[place][:80]!r}")
            columns[names[place]] = row
    return columns


def _call(node: Any, function: Name, arguments: int) -> Call:
    """`node`, which must be a call of `function` with so many arguments."""
    if not (isinstance(node, Call) and node.function == function and len(node.arguments) == arguments):
        raise PickleRefusedError(f"the pickle has no {function} where a table has one")
    return node


def _column_names(index: Any) -> list[str]:
    content = _call(index, _NEW_INDEX, 2).arguments[1]
    state = _call(content.get("data") if isinstance(content, dict) else None, _OBJECTS, 3).state
    names = state[-1] if isinstance(state, tuple) and state else None
    if not isinstance(names, list) or not all(type(name) is str for name in names):
        raise PickleRefusedError("the columns of the pickled table have no names")
    return names


def _array(node: Any, axes: int) -> NDArray[Any]:
    """A read-only array of int64 or float64, little-endian, in row or column order."""
    buffer, dtype, shape, order = _call(node, _NUMBERS, 4).arguments
    kind = _call(dtype, _DTYPE, 3)
    byte_order = kind.state[1] if isinstance(kind.state, tuple) and len(kind.state) > 1 else None
    code = kind.arguments[0]
    if not (type(code) is str and code in ("i8", "f8") and type(byte_order) is str and byte_order == "<"):
        raise PickleRefusedError("the table holds numbers that are neither int64 nor float64")
    if not (type(shape) is tuple and len(shape) == axes and all(type(n) is int and n > 0 for n in shape)):
        raise PickleRefusedError("an array of the table has no shape")
    if type(buffer) is not bytes or type(order) is not str or order not in ("C", "F"):
        raise PickleRefusedError("an array of the table has no content")
    size = 8
    for number in shape:
        size *= number
    if size != len(buffer):
        raise PickleRefusedError(f"an array of the table has {len(buffer)} bytes, but its shape needs {size}")
    array = np.frombuffer(buffer, dtype="<i8" if code == "i8" else "<f8")
    return array.reshape(shape) if order == "C" else array.reshape(shape[::-1]).T


def _places(node: Any, columns: int) -> list[int]:
    """Which columns a block of the table holds."""
    if isinstance(node, Call) and node.function == _SLICE:
        if not all(type(n) is int and 0 <= n <= columns for n in node.arguments) or len(node.arguments) != 3:
            raise PickleRefusedError("a block of the table has no place")
        start, stop, step = node.arguments
        places = list(range(start, stop, step)) if step else []
    else:
        array = _array(node, 1)
        if array.dtype != np.int64:
            raise PickleRefusedError("a block of the table has no place")
        places = array.tolist()
    if not all(0 <= place < columns for place in places):
        raise PickleRefusedError(f"a block of the table lies outside its {columns} columns")
    return places
