"""Checks of a bound layer with synthetic logits: it does what profiles ask for, and else what vLLM does."""

from __future__ import annotations

from collections.abc import Callable

import torch

from expert_registry.errors import CompatibilityError, UnsupportedModelError
from vllm_steermoe_plugin.device.reselect import corrected, group_scores, in_kept_groups, select, weigh
from vllm_steermoe_plugin.device.rewrite import apply_biases
from vllm_steermoe_plugin.device.router_kind import RouterKind
from vllm_steermoe_plugin.device.steering_state import BatchRow, SteeringState
from vllm_steermoe_plugin.settings import SWITCH_OFF
from vllm_steermoe_plugin.steering.profile import SteeringProfile
from vllm_steermoe_plugin.steering.wire import STEER_KEY
from vllm_steermoe_plugin.worker.gate import SteeredGateLinear
from vllm_steermoe_plugin.worker.selection import SteeredSelection

_PROBE = "steermoe-self-check"
_TOKENS = 16
_WEIGHT_ERROR = 1e-5
"""Of weights in float32, of which vLLM's kernels and ours compute a few operations in an order of their own."""
_TIE = 1e-5
"""Scores closer than this, in proportion to the largest, may be taken for equal."""


def check_gate(gate: SteeredGateLinear, state: SteeringState, layer: int) -> None:
    """Send synthetic router logits through a bound gate: untouched, activated, deactivated, biased.

    Raises:
        EngineError: the gate does not do what a profile asks for.
    """
    experts, top_k = state.shape.num_experts, state.shape.top_k
    # Four tokens whose favourites differ; the last expert is nobody's, the first is the favourite of token 0.
    logits = torch.stack([-0.5 * torch.arange(experts).float().roll(shift) for shift in range(min(4, experts))])
    logits = logits.to(state.rules.device)
    ends = layer, experts - 1, 0
    _check_rules(lambda: gate.rewrite(logits.clone()).topk(top_k).indices, state, *ends, gate.sequence_rank)
    if not torch.equal(gate.rewrite(logits.clone()), logits):
        raise CompatibilityError(f"self-check failed: layer {layer} changes the logits of unsteered tokens")
    _check_bias(lambda: gate.rewrite(logits.clone()), logits, state, layer, gate.sequence_rank)


def check_selection(selection: SteeredSelection, state: SteeringState, layer: int) -> None:
    """Let a bound router select from synthetic logits, its weights loaded: as computed here, and as profiles ask.

    Raises:
        EngineError: the router does not do what was read from its attributes, so that a correction would not be what
            it is said to be; or a profile is not obeyed.
    """
    kind, (experts, top_k) = selection.kind, (state.shape.num_experts, state.shape.top_k)
    generator = torch.Generator().manual_seed(layer)
    logits = torch.randn((_TOKENS, experts), generator=generator).to(state.rules.device)
    hidden = torch.zeros((_TOKENS, 1), device=logits.device)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = selection(hidden, logits.clone(), None)
        return weights[:, :top_k].float(), ids[:, :top_k].long()

    weights, ids = run()
    wanted = select(logits, selection.bias, kind, top_k)[1]
    same = (ids.sort(1).values == wanted.sort(1).values).all(1)
    clear = _clear(corrected(logits, selection.bias, kind), kind, top_k)
    why = None
    if not kind.each_group and (clear & ~same).any():
        why = "it selects other experts"
    elif not torch.allclose(weights, weigh(logits, ids, kind), rtol=_WEIGHT_ERROR, atol=_WEIGHT_ERROR * kind.scale):
        why = "it weighs them otherwise"
    if why is not None:
        raise UnsupportedModelError(
            f"self-check failed: the router of layer {layer} should be {kind}, but {why}. To serve this model without "
            f"steering: {SWITCH_OFF}"
        )
    counts = torch.bincount(ids.flatten(), minlength=experts)
    ends = layer, int(counts.argmin()), int(counts.argmax())
    _check_rules(lambda: run()[1], state, *ends, selection.sequence_rank)

    def biased() -> torch.Tensor:
        given = logits.clone()
        selection(hidden, given, None)
        return given

    _check_bias(biased, logits, state, layer, selection.sequence_rank)
    again = run()
    if not (torch.equal(again[0], weights) and torch.equal(again[1], ids)):
        raise CompatibilityError(f"self-check failed: layer {layer} changes the selection of unsteered tokens")


def _check_rules(
    chosen_by: Callable[[], torch.Tensor], state: SteeringState, layer: int, worst: int, best: int, sequence_rank: int
) -> None:
    """Activate an expert that few tokens select, and deactivate one that many do, of `chosen_by() [T, K]`."""
    checks = [("activate", SteeringProfile(activate=frozenset({(layer, worst)})), worst, True)]
    if state.shape.num_experts > state.shape.top_k:
        checks.append(("deactivate", SteeringProfile(deactivate=frozenset({(layer, best)})), best, False))
    for verb, profile, expert, selected in checks:
        chosen = _under(profile, chosen_by, state, sequence_rank)
        if bool((chosen == expert).any(dim=1).all()) != selected or bool((chosen == expert).any()) != selected:
            raise CompatibilityError(
                f"self-check failed: layer {layer} does not {verb} expert {expert}; chosen: {chosen.tolist()}"
            )


def _check_bias(
    biased_by: Callable[[], torch.Tensor], logits: torch.Tensor, state: SteeringState, layer: int, sequence_rank: int
) -> None:
    """Bias an expert, and compare what becomes of `logits [T, E]` with the formula."""
    biases = torch.zeros_like(logits)
    biases[:, 0] = 1
    found = _under(SteeringProfile(bias=((layer, 0, 1.0),)), biased_by, state, sequence_rank)
    wanted = apply_biases(logits, biases)
    least = _TIE * logits.abs().max().item()
    if not torch.allclose(found, wanted, rtol=0, atol=least) or not torch.equal(found[:, 1:], logits[:, 1:]):
        raise CompatibilityError(f"self-check failed: layer {layer} does not bias expert 0 as it should")


def _under(
    profile: SteeringProfile, run: Callable[[], torch.Tensor], state: SteeringState, sequence_rank: int
) -> torch.Tensor:
    """What comes of `run` while every token is steered by a profile."""
    # A rank of a sequence-parallel layer has the tokens after those of the ranks before it.
    tokens = _TOKENS * (1 + sequence_rank)
    state.admit(_PROBE, {STEER_KEY: profile.to_json()}, tokens)
    state.begin_step([BatchRow(_PROBE, 0, tokens)])
    found = run()
    state.forget(_PROBE)
    state.clear_step()
    state.steered_requests = 0
    return found


def _clear(c: torch.Tensor, kind: RouterKind, top_k: int) -> torch.Tensor:
    """Of which tokens `[T]` neither the kept groups nor the selected experts hang on a tie of c `[T, E]`."""
    least = _TIE * c.abs().amax(dim=1)
    clear = _gap(c.masked_fill(~in_kept_groups(c, kind), -torch.inf), top_k) > least
    return clear & (_gap(group_scores(c, kind), kind.kept) > 2 * least)


def _gap(values: torch.Tensor, place: int) -> torch.Tensor:
    """Between the value in a place and the next, of each row; without a next one it is infinite."""
    ordered = torch.nn.functional.pad(values.sort(dim=1, descending=True).values, (0, 1), value=-torch.inf)
    return ordered[:, place - 1] - ordered[:, place]
