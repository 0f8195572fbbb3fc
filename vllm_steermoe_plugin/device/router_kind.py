"""What a router does between its logits and its selection: all that steering has to know of it.

Symbols as in the rest of the package: z logits, u their score, b the correction bias, c = u + b what the selection
goes by. Plain data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]


@dataclass(frozen=True, slots=True)
class RouterKind:
    """How a router of vLLM selects K of E experts and weighs them.

    Attributes:
        score: u of z, elementwise but for the softmax.
        bias: whether a correction bias is added for the selection; weights are of u alone.
        groups: G; the experts are cut into so many runs of equal length.
        kept: M, the groups from which it selects: those with the highest largest c, or sum of the two largest if
            there is a bias.
        renormalize: whether the weights of the K are divided by their sum.
        scale: the factor of the weights.
        own: name of the model's own selection function, if its order is that of z and its weights are its affair.
        log_softmax: whether a shift of z changes what it does, so that the paper's form of the rewrite must stay.
        each_group: whether it selects as many of each group, to which a correction does not keep.
    """

    score: Score
    bias: bool = False
    groups: int = 1
    kept: int = 1
    renormalize: bool = False
    scale: float = 1.0
    own: str = ""
    log_softmax: bool = False
    each_group: bool = False

    @property
    def orders_logits(self) -> bool:
        """Whether the order of selection is the order of z, whatever its dtype, so that a rewrite of z decides it."""
        plain = self.score == "softmax" and not self.bias and self.groups == self.kept and not self.each_group
        return bool(self.own) or plain

    @property
    def arguments(self) -> tuple[Score, int, int, bool, float]:
        """Of the operator `reselect_`, after the others; whether there is a bias it sees from that."""
        return self.score, self.groups, self.kept, self.renormalize, self.scale

    @classmethod
    def of_arguments(
        cls, has_bias: bool, score: Score, groups: int, kept: int, renormalize: bool, scale: float
    ) -> RouterKind:
        """The inverse, as far as a selection is concerned."""
        return cls(score, has_bias, groups, kept, renormalize, scale)

    def __str__(self) -> str:
        parts = [f"{self.score} + bias" if self.bias else self.score]
        if self.each_group:
            parts.append("some of each group")
        elif self.groups != self.kept:
            parts.append(f"{self.kept} of {self.groups} groups")
        parts += [f"by {self.own}"] if self.own else []
        parts += ["renormalized"] if self.renormalize else []
        parts += [f"times {self.scale:g}"] if self.scale != 1 else []
        return ", ".join(parts)
