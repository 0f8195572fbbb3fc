"""Where the checkpoint of steermoe-lab is: a small model that ships with the package."""

from __future__ import annotations

from pathlib import Path

NAME = "steermoe-lab"
MODEL_DIR = Path(__file__).resolve().parent.parent / "lab" / "model"
