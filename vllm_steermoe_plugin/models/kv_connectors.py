"""Which of vLLM's KV connectors keep steerings apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SALTED = frozenset({"LMCacheMPConnector", "MooncakeStoreConnector", "OffloadingConnector", "SimpleCPUOffloadConnector"})
"""vLLM's KV connectors that find what they keep by vLLM's block hashes or with the cache salt, and so by the steering
under which it was computed (but not by what is counted: beside counting, `binding.py` refuses them all). Others go by
the tokens alone, or take what another engine has computed, under whatever."""

_SPECS = frozenset({"CPUOffloadingSpec", "TieringOffloadingSpec"})

_TIERS = frozenset({"fs", "obj"})
"""What `OffloadingConnector` may have behind it: vLLM's own, which keep blocks by their hashes. A tier that fetches
from another engine takes its address from whoever sends the request."""


def is_salted(transfer: Any) -> bool:
    """Whether a KV connector, as configured, brings in only what was computed under the same steering."""
    if transfer.kv_connector not in SALTED or transfer.kv_connector_module_path is not None:
        return False
    extra = transfer.kv_connector_extra_config or {}
    tiers = extra.get("secondary_tiers") or []
    return (
        extra.get("spec_name", "CPUOffloadingSpec") in _SPECS
        and extra.get("spec_module_path") is None
        and all(
            isinstance(tier, Mapping) and tier.get("type") in _TIERS and not tier.get("module_path") for tier in tiers
        )
    )
