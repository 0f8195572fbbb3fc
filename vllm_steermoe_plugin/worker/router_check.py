"""Look at the routers that vLLM has built: is each of them softmax top-k over all experts?

The table of architectures says so beforehand; this is what holds if the table is wrong or vLLM has changed.
"""

from __future__ import annotations

from typing import Any

from vllm_steermoe_plugin.compat.symbols.worker import CPU_ROUTER, CUSTOM_ROUTING, FUSED_TOP_K, GROUPED_TOP_K


def router_obstacle(router: Any, selection: str = "") -> str | None:
    """Why a router does not simply select the top-k of the softmax; None if it does.

    Args:
        router: the router object of one of vLLM's MoE layers.
        selection: qualified name of the model's own selection function, if it may have one.
    """
    fused, grouped = FUSED_TOP_K.load(), GROUPED_TOP_K.load()
    custom, cpu = CUSTOM_ROUTING.load(), CPU_ROUTER.load()
    kind = type(router)
    if kind not in (fused, grouped, custom, cpu):
        return f"its router is a {kind.__name__}, of which it is not known that it selects by softmax top-k"
    # Attributes are read without defaults: one that is gone means that we no longer know what is selected.
    function = router.custom_routing_function if kind in (custom, cpu) else None
    if function is not None:
        return _own_selection(function, selection)
    if router.scoring_func != "softmax":
        return f"its router scores with {router.scoring_func}, not softmax"
    return None if kind is fused else _correction(router) or _grouping(router, is_cpu=kind is cpu)


def _own_selection(function: Any, selection: str) -> str | None:
    name = getattr(function, "__qualname__", repr(function))
    if selection and name == selection:
        return None
    return f"it selects with {name}, of which it is not known that it is softmax top-k"


def _correction(router: Any) -> str | None:
    return None if router.e_score_correction_bias is None else "its selection is corrected by a bias"


def _grouping(router: Any, *, is_cpu: bool) -> str | None:
    if is_cpu and router._hash_indices_table is not None:
        return "it selects by a hash of the token"
    if is_cpu and not router.use_grouped_topk:
        return None
    groups, kept = router.num_expert_group, router.topk_group
    # With as many groups kept as there are, nothing is masked.
    return None if groups == kept else f"it keeps {kept} of {groups} groups of experts first (grouped top-k)"
