"""A matrix of biases, a row for each MoE layer, as a profile: masks like those of MASCing (arXiv 2604.27818)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from expert_registry.errors import UsageError
from vllm_steermoe_plugin.steering.interchange.tensor_files import Matrix
from vllm_steermoe_plugin.steering.profile import SteeringProfile


def profile_of_matrix(
    matrix: Matrix, layers: Sequence[int], *, strength: float = 1.0, threshold: float = 0.0
) -> SteeringProfile:
    """Biases of `strength` times what stands in a matrix.

    Args:
        matrix: `[rows, E]`, finite numbers.
        layers: the checkpoint's layer index of each row.
        strength: alpha.
        threshold: numbers that are absolutely no larger are taken for 0. They are compared in the precision of the
            matrix, so that 0.1 in float32 is not larger than 0.1.

    Raises:
        UsageError: rows and layers do not match, or a number is not finite.
        ProfileError: a bias is out of bounds.
    """
    if len(layers) != len(matrix):
        raise UsageError(f"the matrix has {len(matrix)} rows, but {len(layers)} layers are given for them")
    if not math.isfinite(strength):
        raise UsageError(f"strength {strength} is not a finite number")
    if not 0 <= threshold < math.inf:
        raise UsageError(f"threshold {threshold} must be a number from 0")
    with np.errstate(over="ignore"):
        least = matrix.dtype.type(threshold)
    rows, experts = np.nonzero(np.abs(matrix) > least)
    if not len(rows):
        raise UsageError(f"no number in the matrix is larger than {threshold:g}, so it would steer nothing")
    values = matrix[rows, experts].astype(np.float64).tolist()
    cells = zip(rows.tolist(), experts.tolist(), values, strict=True)
    return SteeringProfile(bias=tuple((layers[row], expert, strength * value) for row, expert, value in cells))
