"""A stand-in: vLLM's and transformers' vision-language modules import torchvision, of which there is no CPU build here.

Its names can be imported and annotated with; nothing can be computed with them. Text-only requests never do.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.0"


class _Name:
    """Stands for anything of torchvision."""

    def __getattr__(self, name: str) -> _Name:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: object, **kwargs: object) -> Any:
        raise NotImplementedError("this is a stand-in for torchvision")


ANY = _Name()


def __getattr__(name: str) -> _Name:
    if name.startswith("__"):
        raise AttributeError(name)
    return ANY
