"""What is read from vLLM's own routers, and the self-check that holds it against what they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expert_registry.errors import EngineError, UnsupportedModelError
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.compat.symbols import worker as symbols
from vllm_steermoe_plugin.compat.symbols.worker import CPU_ROUTER, CUSTOM_ROUTING, FUSED_TOP_K
from vllm_steermoe_plugin.device.router_kind import RouterKind
from vllm_steermoe_plugin.device.steering_state import SteeringState
from vllm_steermoe_plugin.worker.router_kind import kind_of
from vllm_steermoe_plugin.worker.selection import SteeredSelection
from vllm_steermoe_plugin.worker.self_check import check_selection

pytestmark = pytest.mark.engine


def plain(**changes: Any) -> dict[str, Any]:
    return {"top_k": 2, "global_num_experts": 8, **changes}


def chosen_by_hand(**kwargs: Any) -> None:
    """A selection function that a model might bring."""


def cohere() -> Any:
    from vllm.model_executor.models.cohere2_moe import token_choice_with_bias

    return token_choice_with_bias


def llama() -> Any:
    from vllm.model_executor.models.llama4 import Llama4MoE

    return Llama4MoE.custom_routing_function


BIAS = torch.zeros(8)
GROUPS = {"num_expert_group": 4, "topk_group": 2}
ONE_GROUP = {"num_expert_group": 1, "topk_group": 1}
ON_CPU = {"use_grouped_topk": True}


@pytest.mark.parametrize(
    ("internal", "options", "kind"),
    [
        ("FUSED_TOP_K", {}, RouterKind("softmax", renormalize=True)),
        ("FUSED_TOP_K", {"scoring_func": "sigmoid", "renormalize": False}, RouterKind("sigmoid")),
        ("FUSED_TOP_K_BIAS", {"e_score_correction_bias": BIAS}, RouterKind("sigmoid", bias=True, renormalize=True)),
        (
            "FUSED_TOP_K_BIAS",
            {"e_score_correction_bias": BIAS, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5},
            RouterKind("sqrtsoftplus", bias=True, renormalize=True, scale=1.5),
        ),
        ("FUSED_TOP_K_BIAS", {"hash_indices_table": BIAS, "scoring_func": "sqrtsoftplus"}, None),
        ("GROUPED_TOP_K", GROUPS, RouterKind("softmax", groups=4, kept=2, renormalize=True)),
        (
            "GROUPED_TOP_K",
            ONE_GROUP | {"scoring_func": "sigmoid", "e_score_correction_bias": BIAS, "routed_scaling_factor": 2.5},
            RouterKind("sigmoid", bias=True, renormalize=True, scale=2.5),
        ),
        ("CPU_ROUTER", {}, RouterKind("softmax", renormalize=True)),
        # It scales only what it groups.
        ("CPU_ROUTER", {"routed_scaling_factor": 3.0}, RouterKind("softmax", renormalize=True)),
        ("CPU_ROUTER", GROUPS, RouterKind("softmax", renormalize=True)),
        ("CPU_ROUTER", GROUPS | ON_CPU, RouterKind("softmax", groups=4, kept=2, renormalize=True)),
        (
            "CPU_ROUTER",
            GROUPS | ON_CPU | {"scoring_func": "sigmoid", "e_score_correction_bias": BIAS, "renormalize": False},
            RouterKind("sigmoid", bias=True, groups=4, kept=2),
        ),
        ("CPU_ROUTER", {"hash_indices_table": BIAS, "scoring_func": "sqrtsoftplus"}, None),
    ],
)
def test_a_router_is_what_its_attributes_say(internal: str, options: dict[str, Any], kind: RouterKind | None) -> None:
    assert kind_of(getattr(symbols, internal).load()(**plain(**options))) == kind


@pytest.mark.parametrize("router", ["CPU_ROUTER", "CUSTOM_ROUTING"])
def test_a_models_own_selection_is_known_by_its_name(router: str) -> None:
    make = getattr(symbols, router).load()
    assert kind_of(make(**plain(custom_routing_function=cohere()))) == RouterKind("sigmoid", renormalize=True)
    of_llama = kind_of(make(**plain(custom_routing_function=llama())))
    assert of_llama is not None and of_llama.orders_logits and of_llama.own
    with pytest.raises(UnsupportedModelError, match="selects with chosen_by_hand"):
        kind_of(make(**plain(custom_routing_function=chosen_by_hand)))


@pytest.mark.parametrize(
    ("internal", "options", "why"),
    [
        ("GROUPED_TOP_K", {"num_expert_group": 3, "topk_group": 1}, "3 groups do not divide its 8 experts"),
        ("GROUPED_TOP_K", {"num_expert_group": 8, "topk_group": 1}, "8 groups do not divide"),
        ("GROUPED_TOP_K", GROUPS | {"num_fused_shared_experts": 1}, "shared experts are among"),
        ("FUSED_TOP_K_BIAS", {"e_score_correction_bias": BIAS, "bias_vl": BIAS}, "tokens of images"),
        ("CPU_ROUTER", {"scoring_func": "sigmoid"}, "only with use_grouped_topk"),
    ],
)
def test_what_cannot_be_corrected_exactly_is_refused(internal: str, options: dict[str, Any], why: str) -> None:
    with pytest.raises(UnsupportedModelError, match=why):
        kind_of(getattr(symbols, internal).load()(**plain(**options)))


def test_a_router_of_an_unknown_kind_is_refused() -> None:
    class FusedTopKRouter(FUSED_TOP_K.load()):  # type: ignore[misc]
        """Another kind, whatever its name."""

    with pytest.raises(UnsupportedModelError, match="not known"):
        kind_of(FusedTopKRouter(**plain()))
    changed = FUSED_TOP_K.load()(**plain())
    del changed.scoring_func
    with pytest.raises(AttributeError):
        kind_of(changed)


def bound(router: Any, experts: int = 8, rank: int = 0) -> tuple[SteeredSelection, SteeringState]:
    state = SteeringState(
        MoEShape("Any", (3,), experts, router.top_k),
        [3],
        max_requests=4,
        max_tokens=256,
        count_groups=0,
        device=torch.device("cpu"),
    )
    kind = kind_of(router)
    assert kind is not None
    return SteeredSelection(router, kind, state, 0, rank), state


def grouped(**changes: Any) -> Any:
    bias = torch.randn(16, generator=torch.Generator().manual_seed(1)) * 0.7
    options = GROUPS | ON_CPU | {"scoring_func": "sigmoid", "e_score_correction_bias": torch.nn.Parameter(bias)}
    return CPU_ROUTER.load()(top_k=4, global_num_experts=16, **options | changes)


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("changes", [{}, {"renormalize": False, "routed_scaling_factor": 2.5}, ONE_GROUP])
def test_a_router_that_does_what_it_says_passes_the_self_check(changes: dict[str, Any], offset: float) -> None:
    router = grouped(**changes)
    router.e_score_correction_bias.data += offset
    check_selection(*bound(router, 16), 3)


def test_the_ranks_of_a_sequence_parallel_layer_are_checked_with_tokens_of_their_own() -> None:
    for rank in range(3):
        check_selection(*bound(grouped(), 16, rank), 3)


def test_a_router_that_ignores_its_bias_is_refused() -> None:
    router = CPU_ROUTER.load()(**plain(e_score_correction_bias=torch.arange(8.0)))
    with pytest.raises(EngineError, match="should be softmax \\+ bias, renormalized, but it selects other experts"):
        check_selection(*bound(router), 3)


@pytest.mark.parametrize(
    ("attribute", "value", "why"),
    [
        ("topk_group", 3, "selects other experts"),
        ("scoring_func", "softmax", "selects other experts|weighs them otherwise"),
        ("routed_scaling_factor", 1.5, "weighs them otherwise"),
        ("renormalize", False, "weighs them otherwise"),
    ],
)
def test_a_router_that_is_changed_afterwards_is_refused(attribute: str, value: Any, why: str) -> None:
    selection, state = bound(grouped(), 16)
    setattr(selection._router, attribute, value)
    with pytest.raises(EngineError, match=why):
        check_selection(selection, state, 3)


def test_a_selection_that_ignores_its_rules_fails_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_steermoe_plugin.worker import selection as module

    selection, state = bound(grouped(), 16)
    monkeypatch.setattr(module, "reselect_", lambda *_: None)
    with pytest.raises(EngineError, match="does not activate"):
        check_selection(selection, state, 3)
    changing = iter(range(1, 100))
    monkeypatch.undo()
    monkeypatch.setattr(selection, "_compute", _drifting(selection._compute, changing))
    with pytest.raises(EngineError):
        check_selection(selection, state, 3)


def _drifting(compute: Any, numbers: Any) -> Any:
    def drift(*args: Any, **kwargs: Any) -> Any:
        weights, ids = compute(*args, **kwargs)
        return weights + 1e-6 * next(numbers), ids

    return drift


def test_each_rank_of_a_sequence_parallel_layer_reads_the_slots_of_its_own_tokens() -> None:
    _, state = bound(grouped(), 16)
    state.token_slots[:12] = torch.arange(12, dtype=torch.int32)
    share = torch.zeros(4, 16)
    assert [state.slots_of(rank, share)[:4].tolist() for rank in range(3)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]


def test_a_custom_router_of_another_package_with_a_known_name_is_held_against_what_it_does() -> None:
    """The name alone is not believed where the selection is corrected."""

    def token_choice_with_bias(hidden_states: Any, gating_output: Any, topk: int, renormalize: bool) -> Any:
        found = gating_output.sigmoid().neg().topk(topk)
        return -found.values, found.indices

    token_choice_with_bias.__qualname__ = "token_choice_with_bias"
    router = CUSTOM_ROUTING.load()(**plain(custom_routing_function=token_choice_with_bias))
    with pytest.raises(EngineError, match="selects other experts"):
        check_selection(*bound(router), 3)
