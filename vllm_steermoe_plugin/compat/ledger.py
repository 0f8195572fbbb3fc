"""The compatibility table as a whole: what is touched of vLLM's inside, why, and how we notice that it moved.

Every other package reaches vLLM's internals through an entry of `symbols/` (`GATE_LINEAR.load()`). Loading an entry
that has moved, whose signature changed or that lacks an attribute that is read, raises an EngineError that names it,
so a vLLM upgrade fails at start and never in the numbers. `check_ledger` does that for all entries at once; the tests
and `steermoe doctor` call it.

(vLLM's public names, `LLM`, `SamplingParams`, may be imported anywhere.)
"""

from __future__ import annotations

from vllm_steermoe_plugin.compat.internal import Internal
from vllm_steermoe_plugin.compat.symbols import config, core, frontend, http, registry, worker
from vllm_steermoe_plugin.compat.versions import check_version, is_release

LEDGER: tuple[Internal, ...] = tuple(
    value
    for module in (registry, frontend, http, core, worker, config)
    for value in vars(module).values()
    if isinstance(value, Internal)
)
"""All entries."""
WRAPPED = tuple(internal for internal in LEDGER if internal.wrapped)
"""Those that are replaced by a callable of ours."""


def check_ledger() -> None:
    """Load every entry; raise EngineError at the first that moved."""
    check_version()
    for internal in LEDGER:
        internal.load()


def check_source_build() -> None:
    """Of a vLLM that is no release all entries must fit, as its number says nothing; raise EngineError otherwise."""
    if not is_release():
        check_ledger()
