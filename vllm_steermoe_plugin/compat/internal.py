"""One touched symbol of vLLM: how it is found, and how it is wrapped."""

from __future__ import annotations

import dis
import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from expert_registry.errors import CompatibilityError
from vllm_steermoe_plugin.compat.versions import vllm_version

SENTINEL = "__steermoe__"


@dataclass(frozen=True, slots=True)
class Internal:
    """One touched symbol.

    Attributes:
        path: `module:attribute[.attribute]`.
        why: what we use it for.
        parameters: names that its signature must begin with; None if it is not called by position.
        reads: attributes of a class, or of its instances, that we read or call by name.
        mentions: keyword arguments by name that a function's body passes on, on which we rely.
        wrapped: whether it is replaced by a callable of ours (`wrap_once`).
        formerly: its path in the oldest supported release, if it has moved since.
    """

    path: str
    why: str
    parameters: tuple[str, ...] | None = None
    reads: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()
    wrapped: bool = False
    formerly: str | None = None

    @property
    def module(self) -> str:
        """The part of `path` before the colon."""
        return self.path.partition(":")[0]

    @property
    def name(self) -> str:
        """The last part of `path`: what its owner has it under."""
        return self.path.replace(":", ".").rpartition(".")[2]

    def load(self) -> Any:
        """Import it.

        Raises:
            CompatibilityError: it is not there, its parameters changed, or it has not all that we read.
        """
        value = self._find(self.path)
        if self.parameters is not None:
            found = tuple(inspect.signature(inspect.unwrap(value)).parameters)
            if found[: len(self.parameters)] != self.parameters:
                raise CompatibilityError(
                    f"{self.path} of vLLM {vllm_version()} takes {found}, but {self.parameters} was expected; "
                    f"it is needed to {self.why}"
                )
        missing = [name for name in self.reads if not provides(value, name)]
        missing += [name for name in self.mentions if not _mentions(inspect.unwrap(value).__code__, name)]
        if missing:
            raise CompatibilityError(
                f"{self.path} of vLLM {vllm_version()} has no {', '.join(missing)}; it is needed to {self.why}"
            )
        return value

    def owner(self) -> Any:
        """Import the class or module that has it.

        Raises:
            CompatibilityError: it is not there.
        """
        return self._find(self.path[: -len(self.name) - 1])

    def _find(self, path: str) -> Any:
        for place in (path, *([self.formerly] if self.formerly is not None else [])):
            module, _, attributes = place.partition(":")
            try:
                value: Any = importlib.import_module(module)
                for attribute in attributes.split(".") if attributes else ():
                    value = getattr(value, attribute)
            except (ImportError, AttributeError) as error:
                why = error
            else:
                return value
        raise CompatibilityError(f"vLLM {vllm_version()} has no {self.path} ({why}); it is needed to {self.why}")


def provides(owner: Any, name: str) -> bool:
    """Whether a class has an attribute, or its instances will: declared as a field, or set by one of its methods."""
    if hasattr(owner, name):
        return True
    for cls in inspect.getmro(owner) if inspect.isclass(owner) else ():
        if name in vars(cls).get("__annotations__", {}):
            return True
        for member in vars(cls).values():
            code = inspect.unwrap(member).__code__ if isinstance(member, FunctionType) else None
            if code is not None and name in code.co_names and ("STORE_ATTR", name) in _operations(code):
                return True
    return False


def _mentions(code: CodeType, name: str) -> bool:
    return any(isinstance(constant, tuple) and name in constant for constant in code.co_consts)


def _operations(code: CodeType) -> set[tuple[str, Any]]:
    return {(instruction.opname, instruction.argval) for instruction in dis.get_instructions(code)}


def wrap_once(internal: Internal, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the method or function of a ledger entry by `make(original)`; a second call does nothing.

    Plugins may be loaded more than once in a process; wrapping twice would steer twice.

    Args:
        internal: an entry that says `wrapped`, so that the number of wrapped callables can be counted.
        make: the replacement, given the original.

    Raises:
        CompatibilityError: it has moved, or its parameters changed.
    """
    if not internal.wrapped:
        raise CompatibilityError(f"{internal.path} is wrapped, but its entry does not say so")
    original = internal.load()
    if getattr(original, SENTINEL, False):
        return
    # `wraps` keeps the signature, which callers and this file inspect.
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, SENTINEL, True)
    setattr(internal.owner(), internal.name, replacement)
