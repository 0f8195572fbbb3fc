"""Tables like those of the authors' release, with made-up counts, and an index that names them.

`python tests/support/released.py FOLDER` writes the two that are kept in tests/registry/data.
"""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expert_registry import Ranking, Recommended
from expert_registry.published.index import PullIndex

MODEL = "org/Tiny-MoE"
LICENSE = b"Do with these made-up numbers what you like.\n"
BASE_URL = "http://127.0.0.1:9/revision/"
SHORT = ("layer", "expert", "a1", "a2", "d1", "d2", "a1_n", "a2_n", "risk_diff", "Layer_Expert", "risk_diff_abs")
MORE = (
    *("activated_only_in_1", "activated_only_in_2", "activated_only_in_1_prob", "activated_only_in_2_prob"),
    *("log_odds_ratio", "t_stat", "t_stat_abs", "mean_d", "std_d", "median_d", "mean_a", "mean_b", "std_a", "std_b"),
    *("pos_to_neg_ratio", "neg_to_pos_ratio", "p_value", "activated_1-2", "activated_1-2_abs"),
    *("activated_1-2_prob", "activated_1-2_prob_abs", "log_odds_ratio_abs"),
)
LONG = (*(name for name in SHORT if name not in ("a1_n", "a2_n")), *MORE)


def columns_of(ranking: Ranking) -> dict[str, Any]:
    """The columns that both schemas share, in order of the absolute risk difference."""
    counts, n1, n2 = ranking.counts, *(int(n) for n in ranking.counts.tokens)
    experts = ranking.experts()
    rows = {layer: row for row, layer in enumerate(ranking.shape.layers)}
    a1 = np.array([counts.activations_1[rows[e.layer], e.expert] for e in experts], dtype=np.float64)
    a2 = np.array([counts.activations_2[rows[e.layer], e.expert] for e in experts], dtype=np.float64)
    return {
        "layer": np.array([e.layer for e in experts]),
        "expert": np.array([e.expert for e in experts]),
        "a1": a1,
        "a2": a2,
        "d1": n1 - a1,
        "d2": n2 - a2,
        "a1_n": a1 / n1,
        "a2_n": a2 / n2,
        "risk_diff": a1 / n1 - a2 / n2,
        "risk_diff_abs": abs(a1 / n1 - a2 / n2),
        "Layer_Expert": [f"L{e.layer:02d}\nE{e.expert:02d}" for e in experts],
    }


def pickled(columns: dict[str, Any], schema: tuple[str, ...]) -> bytes:
    """A pandas table with the columns of a schema; those that nobody reads are filled with halves."""
    import pandas as pd

    rows = len(columns["layer"])
    filled = {"p_value": np.full(rows, -1), **columns}
    frame = pd.DataFrame({name: filled.get(name, np.full(rows, 0.5)) for name in schema if name != "Layer_Expert"})
    frame.insert(2, "Layer_Expert", pd.Series(columns["Layer_Expert"], dtype=object))
    frame.columns = pd.Index([str(name) for name in frame.columns], dtype=object)
    buffer = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        # pandas 3 calls its classes by shorter names than the version that wrote the release.
        patch.setattr(pd.DataFrame, "__module__", "pandas.core.frame")
        patch.setattr(pd.Index, "__module__", "pandas.core.indexes.base")
        patch.setattr(pd.RangeIndex, "__module__", "pandas.core.indexes.range")
        frame.copy().to_pickle(buffer)
    return buffer.getvalue()


def index_of(files: dict[str, bytes], ranking: Ranking, base_url: str = BASE_URL) -> PullIndex:
    """An index of tables by behaviour, all of the model of `ranking`."""
    card = ranking.card
    return PullIndex.model_validate(
        {
            "sources": {
                "made-up": {
                    "repository": "org/release",
                    "revision": "0" * 40,
                    "base_url": base_url,
                    "published": "2026-01-01",
                    "license": {
                        "name": "Made-up licence",
                        "summary": "Anything.",
                        "path": "LICENSE",
                        "size": len(LICENSE),
                        "sha256": hashlib.sha256(LICENSE).hexdigest(),
                    },
                }
            },
            "models": {
                card.model.id: {
                    "architecture": card.model.architecture,
                    "layers": len(ranking.shape.layers),
                    "num_experts": card.num_experts,
                    "top_k": card.top_k,
                }
            },
            "behaviours": {
                name: {"sides": ("with", "without"), "data": "made up", "span": "all", "safety": name == "safety"}
                for name in files
            },
            "rankings": tuple(
                {
                    "model": card.model.id,
                    "behaviour": name,
                    "version": 1,
                    "source": "made-up",
                    "path": f"tables/[{name}].pkl",
                    "size": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "recommended": Recommended(activate=1, deactivate=3),
                    "recommended_reverse": Recommended(activate=2, deactivate=1),
                }
                for name, data in files.items()
            ),
        }
    )


if __name__ == "__main__":
    from tests.support.made_rankings import make_ranking

    for stem, schema in (("released-11-columns", SHORT), ("released-31-columns", LONG)):
        table = pickled(columns_of(make_ranking(7, layers=(0, 1, 2))), schema)
        (Path(sys.argv[1]) / f"{stem}.pkl").write_bytes(table)
