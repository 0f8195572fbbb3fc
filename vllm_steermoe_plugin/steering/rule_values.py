"""The numbers of a rule table."""

from __future__ import annotations

ACTIVATE = 1
DEACTIVATE = -1
OWN_WEIGHT = 2
"""Activate, and leave the expert its own weight (where a router's selection is corrected)."""
