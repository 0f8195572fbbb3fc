"""Read from the routers that vLLM has built what they do; a router of which that is not known is not steered.

The table of architectures does not say it: what a config asks for, what a model file makes of it and what a platform
can do are three things. The self-check after loading then holds what is read here against what a router does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from expert_registry.errors import UnsupportedModelError
from vllm_steermoe_plugin.compat.internal import Internal
from vllm_steermoe_plugin.compat.symbols.worker import (
    CPU_ROUTER,
    CUSTOM_ROUTING,
    FUSED_TOP_K,
    FUSED_TOP_K_BIAS,
    GROUPED_TOP_K,
)
from vllm_steermoe_plugin.device.router_kind import RouterKind

OWN_SELECTIONS = {
    # The models' own functions; all of the first three order experts by z.
    "Gemma4Router.routing_function": RouterKind("softmax", own="Gemma4Router"),
    "Llama4MoE.custom_routing_function": RouterKind("sigmoid", own="Llama4MoE"),
    "phimoe_routing_function": RouterKind("softmax", own="sparse mixer", log_softmax=True),
    "token_choice_with_bias": RouterKind("sigmoid"),  # Of Cohere; it has no bias.
}
_BY_GROUP = "InternS1ProMoeSparseMoeBlock._custom_routing_function"


def kind_of(router: Any) -> RouterKind | None:
    """What a router of one of vLLM's MoE layers does; None if it selects by a hash of the token, and not by logits.

    Raises:
        UnsupportedModelError: it is not known, or steering would not be exact; the message says why.
    """
    name = type(router).__name__
    internal, read = _READERS.get(name, (None, None))
    if internal is None or read is None or type(router) is not internal.load():
        raise UnsupportedModelError(f"its router is a {name}, of which it is not known what it selects")
    return read(router)


# Attributes are read without defaults: one that is gone means that we no longer know what is selected.
def _plain(router: Any) -> RouterKind:
    return RouterKind(router.scoring_func, renormalize=router.renormalize)


def _biased(router: Any) -> RouterKind | None:
    if router._hash_indices_table is not None:
        return None
    _refuse(router.bias_vl is not None, "tokens of images have a correction bias of their own")
    _refuse_fused_shared_experts(router)
    return RouterKind(
        router.scoring_func,
        bias=router.e_score_correction_bias is not None,
        renormalize=router.renormalize,
        scale=router.routed_scaling_factor,
    )


def _on_gpu_in_groups(router: Any) -> RouterKind:
    _refuse_fused_shared_experts(router)
    return _grouped(router)


def _on_cpu(router: Any) -> RouterKind | None:
    if router.use_grouped_topk:
        return _grouped(router)
    if router._hash_indices_table is not None:
        return None
    if router.custom_routing_function is not None:
        return _own(router)
    _refuse(router.scoring_func == "sigmoid", "vLLM's CPU build selects by a sigmoid only with use_grouped_topk")
    biased = router.e_score_correction_bias is not None
    # This one scales nothing but what it makes of a sqrt(softplus).
    scale = router.routed_scaling_factor if router.scoring_func == "sqrtsoftplus" else 1.0
    return RouterKind(router.scoring_func, bias=biased, renormalize=router.renormalize, scale=scale)


def _grouped(router: Any) -> RouterKind:
    experts, groups = router.global_num_experts, router.num_expert_group
    _refuse(experts <= groups or experts % groups != 0, f"{groups} groups do not divide its {experts} experts")
    return RouterKind(
        router.scoring_func,
        router.e_score_correction_bias is not None,
        groups,
        router.topk_group,
        router.renormalize,
        router.routed_scaling_factor,
    )


def _own(router: Any) -> RouterKind:
    name = getattr(router.custom_routing_function, "__qualname__", repr(router.custom_routing_function))
    if name == _BY_GROUP:
        return RouterKind("softmax", renormalize=router.renormalize, each_group=True)
    known = OWN_SELECTIONS.get(name)
    if known is None:
        raise UnsupportedModelError(f"it selects with {name}, of which it is not known what it does")
    return known if known.own else RouterKind(known.score, renormalize=router.renormalize)


def _refuse_fused_shared_experts(router: Any) -> None:
    _refuse(router.num_fused_shared_experts > 0, "its shared experts are among the selected ones")


def _refuse(applies: bool, why: str) -> None:
    if applies:
        raise UnsupportedModelError(why)


_READERS: dict[str, tuple[Internal, Callable[[Any], RouterKind | None]]] = {
    internal.name: (internal, read)
    for internal, read in (
        (FUSED_TOP_K, _plain),
        (FUSED_TOP_K_BIAS, _biased),
        (GROUPED_TOP_K, _on_gpu_in_groups),
        (CUSTOM_ROUTING, _own),
        (CPU_ROUTER, _on_cpu),
    )
}
"""By the name of the class, whose subclasses are others."""
