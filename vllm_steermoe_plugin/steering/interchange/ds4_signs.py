"""The sign map of ds4 (antirez/ds4, pull request 168) as a profile: 43 x 256 bare float32, of which the sign steers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expert_registry.errors import UsageError
from vllm_steermoe_plugin.steering.profile import SteeringProfile

LAYERS, EXPERTS = 43, 256
"""Of the model: rows are all its layers, by their index."""
SIZE = LAYERS * EXPERTS * 4
"""Bytes of the file."""
_HASHED = 3
"""The first layers route by a hash of the token."""


def profile_of_signs(data: bytes) -> SteeringProfile:
    """Activate experts with a positive number, deactivate those with a negative one.

    Raises:
        UsageError: it is not that map, or steers a layer that cannot be steered.
        ProfileError: all numbers are 0.
    """
    if len(data) != SIZE:
        raise UsageError(f"the map has {len(data)} bytes; {LAYERS} x {EXPERTS} float32 take {SIZE}")
    values = np.frombuffer(data, dtype="<f4").reshape(LAYERS, EXPERTS)
    if not np.isfinite(values).all():
        layer, expert = np.argwhere(~np.isfinite(values))[0].tolist()
        raise UsageError(f"layer {layer}, expert {expert}: {values[layer, expert]} is not a finite number")
    hashed = np.argwhere(values[:_HASHED]).tolist()
    if hashed:
        layer, expert = hashed[0]
        raise UsageError(
            f"layer {layer}, expert {expert}: this layer routes by a hash of the token, so nothing steers it"
        )
    return SteeringProfile(activate=_cells(values > 0), deactivate=_cells(values < 0))


def _cells(where: NDArray[np.bool_]) -> frozenset[tuple[int, int]]:
    return frozenset((layer, expert) for layer, expert in np.argwhere(where).tolist())
