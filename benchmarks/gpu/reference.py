"""The rewrite in float64, for whole batches, written without the code under test; and what counts as equal to it."""

from __future__ import annotations

import torch

ABSOLUTE = 4e-6
"""Error of float32 sums of up to 1024 exponentials."""
SIGMA_ERROR = 2.0**-18
"""Of a float32 standard deviation of up to 1024 logits, in proportion to the largest: sums in 32 parts of 32."""
UNITS = 4
"""Units in the last place: one for the rounding, and the float32 arithmetic before it."""


def expected(logits: torch.Tensor, rules: torch.Tensor, *, log_softmax: bool = False) -> torch.Tensor:
    """Logits `[T, E]` rewritten by rules float16 `[T, E]`: float64, but rounded to the dtype of `logits`."""
    dtype = logits.dtype
    logits = biased(logits, rules)
    force = rules.where(rules.isinf(), 0)
    scores = torch.log_softmax(logits.double(), dim=-1) if log_softmax else logits.double()
    high, low = scores.amax(-1, keepdim=True), scores.amin(-1, keepdim=True)
    up = torch.nextafter(high.to(dtype), torch.tensor(torch.inf, dtype=dtype)).double()
    down = torch.nextafter(low.to(dtype), torch.tensor(-torch.inf, dtype=dtype)).double()
    above = torch.maximum((high + 0.01).to(dtype).double(), up)
    below = torch.minimum((low - 0.01).to(dtype).double(), down)
    others = torch.where((force != 0).any(-1, keepdim=True), scores.to(dtype).double(), logits.double())
    steered = torch.where(force > 0, above, torch.where(force < 0, below, others))
    steered = torch.where(logits.double().amax(-1, keepdim=True).isfinite(), steered, torch.nan)
    return torch.where((rules != 0).any(-1, keepdim=True), steered, logits.double())


def what_rules_do(rules: torch.Tensor) -> torch.Tensor:
    """Of rules `[S, L, E]` uint8 `[L]`: 1 where any forces an expert, 2 where any is a bias, 3 for both."""
    forces, biases = (rules.abs() > 1000).any(2).any(0), ((rules != 0) & (rules.abs() <= 1000)).any(2).any(0)
    return forces.to(torch.uint8) + 2 * biases.to(torch.uint8)


def biased(logits: torch.Tensor, rules: torch.Tensor) -> torch.Tensor:
    """Logits `[T, E]` with their biases, in their dtype."""
    z, bias = logits.double(), rules.where(rules.isfinite(), 0).double()
    known = z > -torch.inf
    number = known.sum(-1, keepdim=True)
    mean = z.where(known, 0).sum(-1, keepdim=True) / number
    sigma = ((z - mean).where(known, 0).square().sum(-1, keepdim=True) / number).sqrt()
    return torch.where(bias != 0, (z + bias * sigma).to(logits.dtype), logits)


def fault(before: torch.Tensor, after: torch.Tensor, rules: torch.Tensor, *, log_softmax: bool = False) -> str | None:
    """What is wrong with `after`, logits `[T, E]` that were `before` and were to obey rules float16 `[T, E]`; or None.

    Rows without a rule must be equal bit for bit, and logits without one unless they become log-probabilities or their
    row broke down. In the others each value must be the expected one but for
    rounding, activated experts strictly first and deactivated ones strictly last (no order is asked of rows with
    NaN, and nothing is below -inf). Compared on the CPU, wherever the tensors are: not every operation that this
    takes exists for every dtype on every GPU.
    """
    before, after, rules = before.cpu(), after.cpu(), rules.cpu()
    ruled = (rules != 0).any(-1)
    if not torch.equal(_bits(after)[~ruled], _bits(before)[~ruled]):
        return "a row without a rule was changed"
    got, rules = after[ruled].double(), rules[ruled]
    wanted = expected(before[ruled], rules, log_softmax=log_softmax)
    force = rules.where(rules.isinf(), 0)
    kept = (rules == 0) & ~wanted.isnan() & ~((force != 0).any(-1, keepdim=True) & log_softmax)
    if not torch.equal(_bits(after[ruled])[kept], _bits(before[ruled])[kept]):
        return "a logit without a rule was changed"
    unit = torch.finfo(before.dtype).eps
    largest = before[ruled].double().nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True)
    absolute = ABSOLUTE + SIGMA_ERROR * rules.where(rules.isfinite(), 0).abs().double().amax(-1, keepdim=True) * largest
    close = ((got - wanted).abs() <= UNITS * unit * wanted.abs() + absolute) | (got == wanted)
    close |= got.isnan() & wanted.isnan()
    if not close.all():
        at = tuple((~close).nonzero()[0].tolist())
        return f"{int((~close).sum())} values differ, the first is {got[at].item()} instead of {wanted[at].item()}"
    finite = ~wanted.isnan().any(-1)
    got, rules = got[finite], force[finite]
    infinity = torch.inf
    first = got.masked_fill(rules <= 0, infinity).amin(-1) > got.masked_fill(rules > 0, -infinity).amax(-1)
    if not (first | (rules > 0).all(-1) | ~(rules > 0).any(-1)).all():
        return "an activated expert is not strictly first"
    last_of_others = got.masked_fill(rules < 0, infinity).amin(-1)
    last = got.masked_fill(rules >= 0, -infinity).amax(-1) < last_of_others
    if not (last | (last_of_others == -infinity) | ~(rules < 0).any(-1)).all():
        return "a deactivated expert is not strictly last"
    return None


def expected_counts(topk_ids: torch.Tensor, groups: torch.Tensor, num_groups: int, num_experts: int) -> torch.Tensor:
    """Selections int64 `[G + 1, E]`, group 0 empty, of ids `[T, K]` whose tokens are in groups int32 `[T]`."""
    counts = torch.zeros((num_groups + 1) * num_experts, dtype=torch.int64)
    flat = (groups.long().cpu()[:, None] * num_experts + topk_ids.long().cpu())[groups.cpu() > 0].flatten()
    return (counts + torch.bincount(flat, minlength=len(counts))).view(num_groups + 1, num_experts)


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({4: torch.int32, 2: torch.int16}[x.element_size()])
