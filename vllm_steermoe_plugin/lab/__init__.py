"""steermoe-lab: a small mixture of experts with planted routing, shipped as a test bed.

The world it speaks about is in `world`, what was planted in `planting`; `train`
makes the model and `evaluate` measures it with torch alone. See README.md.
"""

from __future__ import annotations

from pathlib import Path

NAME = "steermoe-lab"
MODEL_DIR = Path(__file__).resolve().parent / "model"
