"""Read a pickle as a tree of inert data. Nothing is imported, called or built but the nodes below.

Python's own unpickler runs what a file says, and even one that restricts the names it may look up can be made
to allocate or to hash without end. The files to be read here, pandas tables, need few operations, so this is a
small machine for just these: each is carried out in time and memory proportional to the file, a name becomes a
`Name`, a call becomes a `Call`, and every other operation is refused by name.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from expert_registry.errors import SteerMoEError

MAX_BYTES = 8 << 20
MAX_OPERATIONS = 500_000


class PickleRefusedError(SteerMoEError):
    """A pickle holds something other than the table that it should hold, or is damaged."""

    code = "STEERMOE-E202"


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that the pickle names. It is not looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Call:
    """What the pickle would call with which arguments, and the state it would set on the result."""

    function: Name
    arguments: tuple[Any, ...]
    state: Any = field(default=None)


_MARK = object()


class _Machine:
    """Stack and memo of a pickle that is being read."""

    def __init__(self, allowed: frozenset[Name]) -> None:
        self.allowed = allowed
        self.stack: list[Any] = []
        self.memo: list[Any] = []

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleRefusedError("the pickle takes from an empty stack")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise PickleRefusedError(f"the pickle adds to something that is no {kind.__name__}")
        return self.stack[-1]

    def pop_marked(self) -> list[Any]:
        items: list[Any] = []
        while self.stack:
            item = self.stack.pop()
            if item is _MARK:
                return items[::-1]
            items.append(item)
        raise PickleRefusedError("the pickle has no mark where it needs one")

    def take(self, number: int) -> tuple[Any, ...]:
        return tuple([self.pop() for _ in range(number)][::-1])

    def push_constant(self, value: Any) -> None:
        self.stack.append(value)

    def memoize(self, _: Any) -> None:
        # The index is the memo's length, never one that the file chooses.
        item = self.pop()
        self.stack.append(item)
        self.memo.append(item)

    def get(self, index: int) -> None:
        if index >= len(self.memo):
            raise PickleRefusedError(f"the pickle refers to its item {index} of {len(self.memo)}")
        self.stack.append(self.memo[index])

    def name(self, _: Any) -> None:
        module, name = self.take(2)
        if type(module) is not str or type(name) is not str:
            raise PickleRefusedError("the pickle names something by what is no text")
        found = Name(module, name)
        if found not in self.allowed:
            raise PickleRefusedError(f"the pickle names {str(found)[:120]}, which no table of counts needs")
        self.stack.append(found)

    def call(self, _: Any) -> None:
        function, arguments = self.take(2)
        if type(function) is not Name or type(arguments) is not tuple:
            raise PickleRefusedError("the pickle calls something that is no name")
        self.stack.append(Call(function, arguments))

    def build(self, _: Any) -> None:
        state = self.pop()
        target = self.top(Call)
        if target.state is not None:
            raise PickleRefusedError("the pickle sets a state twice")
        target.state = state

    def append_all(self, _: Any) -> None:
        items = self.pop_marked()
        self.top(list).extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise PickleRefusedError("the pickle has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Only texts: the hash of nested tuples can take for ever.
            if type(key) is not str:
                raise PickleRefusedError(f"the pickle has a key of type {type(key).__name__}")
            target[key] = value

    def set_one(self, _: Any) -> None:
        self._set(list(self.take(2)))

    def set_all(self, _: Any) -> None:
        self._set(self.pop_marked())


def _nothing(machine: _Machine, _: Any) -> None:
    """PROTO and FRAME say nothing about the content."""


_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _nothing,
    "FRAME": _nothing,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "MARK": lambda machine, _: machine.stack.append(_MARK),
    "STACK_GLOBAL": _Machine.name,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "APPENDS": _Machine.append_all,
    "SETITEM": _Machine.set_one,
    "SETITEMS": _Machine.set_all,
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_marked())),
    "TUPLE1": lambda machine, _: machine.stack.append(machine.take(1)),
    "TUPLE2": lambda machine, _: machine.stack.append(machine.take(2)),
    "TUPLE3": lambda machine, _: machine.stack.append(machine.take(3)),
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "BININT": _Machine.push_constant,
    "BININT1": _Machine.push_constant,
    "BININT2": _Machine.push_constant,
    "SHORT_BINUNICODE": _Machine.push_constant,
    "BINUNICODE": _Machine.push_constant,
    "SHORT_BINBYTES": _Machine.push_constant,
    "BINBYTES": _Machine.push_constant,
    "BYTEARRAY8": lambda machine, argument: machine.stack.append(bytes(argument)),
}


def read_tree(data: bytes, allowed: frozenset[Name]) -> Any:
    """The tree of a pickle.

    Args:
        data: the whole pickle, at most MAX_BYTES.
        allowed: the only names that may stand in it.

    Raises:
        PickleRefusedError: too large, damaged, an operation or a name that is not allowed.
    """
    if len(data) > MAX_BYTES:
        raise PickleRefusedError(f"the pickle has {len(data)} bytes; at most {MAX_BYTES} are read")
    machine = _Machine(allowed)
    end = -1
    try:
        for count, (operation, argument, position) in enumerate(pickletools.genops(data)):
            if operation.name == "STOP":
                end = (position or 0) + 1
                break
            act = _OPERATIONS.get(operation.name)
            if act is None or count >= MAX_OPERATIONS:
                what = "too many operations" if act else f"the operation {operation.name}, which no table needs"
                raise PickleRefusedError(f"the pickle has {what} (byte {position})")
            act(machine, argument)
    except (ValueError, OverflowError) as error:
        if isinstance(error, SteerMoEError):
            raise
        raise PickleRefusedError(f"the pickle is damaged: {str(error)[:200]}") from None
    tree = machine.pop()
    if machine.stack or end != len(data):
        raise PickleRefusedError("the pickle holds more than one object")
    return tree
