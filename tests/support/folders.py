"""Where things are in the checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
"""The checkout."""
RELEASED_DATA = ROOT / "tests/registry/data"
"""Made-up files in the form of the authors' release."""
EVAL_DATA = ROOT / "tests/evaluation/data"
"""A few rows in the columns of each benchmark."""
