"""The numbers of a rule table, in half precision: 0 leaves an expert alone, any other up to `FORCED` is a bias."""

from __future__ import annotations

import math

ACTIVATE = math.inf
DEACTIVATE = -math.inf
OWN_WEIGHT = 65504.0
"""Activate, and leave the expert its own weight (where a router's selection is corrected). The largest finite one."""
FORCED = 1024.0
"""An absolute value above it forces an expert in or out; biases are far below."""

FORCES, BIASES = 1, 2
"""Bits that say of a layer what its rules do."""
