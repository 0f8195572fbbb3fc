"""The authors' twelve tables, where a copy of them is at hand: `shared/upstream-rankings` in or beside the project.

Their licence allows noncommercial research only, so they are not in this repository; without a copy these tests are
skipped, and counted. What is ranked and compiled from them through the registry is compared with a computation of its
own: another reader of the pickles, the definitions of the paper written as loops, and the authors' numbers from
`num_experts.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expert_registry import Registry, RoutingCounts, rank_experts
from expert_registry.errors import PolicyError
from expert_registry.published.index import load_index
from expert_registry.published.pull import import_folder
from expert_registry.sharing import LICENSE_FILE
from expert_registry.statistics import cautions, log_odds
from tests.support.folders import ROOT
from vllm_steermoe_plugin.steering.request import parse_request
from vllm_steermoe_plugin.steering.resolve import resolve
from vllm_steermoe_plugin.steering.rule_values import ACTIVATE, DEACTIVATE
from vllm_steermoe_plugin.steering.rules import compile_rules

PLACES = [folder / "shared" / "upstream-rankings" for folder in (ROOT, ROOT.parent)]
RELEASE = next((place for place in PLACES if place.is_dir()), None)
pytestmark = pytest.mark.skipif(RELEASE is None, reason="no copy of the authors' release (shared/upstream-rankings)")

INDEX = load_index()
TABLE = {
    "openai/gpt-oss-120b": (36, 128, 4, (5, 100), (5, 0), (0, 100)),
    "openai/gpt-oss-20b": (24, 32, 4, (10, 50), (5, 0), (0, 20)),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": (32, 8, 2, (10, 100), (20, 0), (20, 0)),
    "allenai/OLMoE-1B-7B-0125-Instruct": (16, 64, 8, (0, 50), (5, 0), (10, 125)),
    "microsoft/Phi-3.5-MoE-instruct": (32, 16, 2, (10, 75), (5, 0), (5, 50)),
    "Qwen/Qwen3-30B-A3B": (48, 128, 8, (0, 500), (15, 0), (5, 480)),
}
"""Layers, experts, top-k, and numbers (activated, deactivated) for faithful, safe and the reverse of safe."""
ROWS = [(model, request) for model in TABLE for request in ("faithful", "safe", "safe:reverse")]
NUMBERS = {"faithful": 3, "safe": 4, "safe:reverse": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry folder with the twelve rankings."""
    assert RELEASE is not None
    target = tmp_path_factory.mktemp("registry")
    assert len(import_folder(INDEX, RELEASE, target, accept_license=True)) == 12
    return target


class _Table:
    """Takes the place of every class and function of pandas in `_PlainReader`."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _PlainReader(pickle.Unpickler):
    """Python's own unpickler, with real numpy arrays and nothing of pandas."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "dtype"), ("numpy", "ndarray"), ("builtins", "slice")):
            return super().find_class(module, name)
        if (module, name) in (("numpy._core.numeric", "_frombuffer"), ("numpy._core.multiarray", "_reconstruct")):
            return super().find_class(module, name)
        assert module.split(".", maxsplit=1)[0] == "pandas", (module, name)
        return _Table


def plain_columns(model: str, behaviour: str) -> dict[str, list[Any]]:
    """Columns of a released table, by a reader that shares nothing with the importer."""
    assert RELEASE is not None
    name = f"activations_[{model.replace('/', '--')}]_[{behaviour}].pkl"
    sums = dict(reversed(line.split(maxsplit=1)) for line in (RELEASE / "SHA256SUMS").read_text().splitlines())
    data = (RELEASE / name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == sums[name]
    with (RELEASE / name).open("rb") as file:
        blocks, (columns, _) = _PlainReader(file).load().state["_mgr"].arguments
    names = list(columns.arguments[1]["data"])
    found: dict[str, list[Any]] = {}
    for block in blocks:
        values, placement, _ = block.arguments
        places = range(placement.start, placement.stop) if isinstance(placement, slice) else placement.tolist()
        for place, row in zip(places, values, strict=True):
            found[names[place]] = row.tolist()
    return found


def expected_rules(model: str, request: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Rules [L, E] of a row of the paper's table and what does not fit, from a released table by the paper's words."""
    layers, experts, top_k, *_ = TABLE[model]
    columns = plain_columns(model, "faithfulness" if request == "faithful" else "safety")
    n_activate, n_deactivate = TABLE[model][NUMBERS[request]]
    sign = -1 if request.endswith("reverse") else 1
    # The authors' own order of rows is by the absolute risk difference.
    order = list(zip(columns["layer"], columns["expert"], columns["risk_diff"], strict=True))
    assert [abs(d) for *_, d in order] == sorted((abs(d) for *_, d in order), reverse=True)
    rules = np.zeros((layers, experts), dtype=np.float16)
    full: Counter[int] = Counter()
    dropped = []
    for layer, expert, _ in [row for row in order if sign * row[2] > 0][:n_activate]:
        if full[layer] < top_k:
            full[layer] += 1
            rules[layer, expert] = ACTIVATE
        else:
            dropped.append((layer, expert))
    for layer, expert, _ in [row for row in order if sign * row[2] < 0][:n_deactivate]:
        rules[layer, expert] = DEACTIVATE
    return rules, dropped


def test_the_index_says_what_the_release_and_the_paper_say() -> None:
    assert RELEASE is not None
    sums = dict(reversed(line.split(maxsplit=1)) for line in (RELEASE / "SHA256SUMS").read_text().splitlines())
    listed = {Path(item.path).name: item for item in INDEX.rankings}
    assert {name: item.sha256 for name, item in listed.items()} == {n: s for n, s in sums.items() if n.endswith(".pkl")}
    assert all((RELEASE / name).stat().st_size == item.size for name, item in listed.items())
    rows = [json.loads(line) for line in (RELEASE / "num_experts.jsonl").read_text().splitlines()]
    assert len(rows) == 36
    for row in rows:
        item = INDEX.find(row["model"], row["Task"])[0]
        numbers = item.recommended_reverse if row["Reverse"] else item.recommended
        assert numbers is not None
        assert row["Num Experts"] == (numbers.activate if row["Activation"] == "Activated" else numbers.deactivate)
        assert row["Total Experts"] == INDEX.models[item.model].layers * INDEX.models[item.model].num_experts


@pytest.mark.parametrize(("model", "request_text"), ROWS)
def test_a_profile_by_default_is_that_of_the_paper(folder: Path, model: str, request_text: str) -> None:
    shape = INDEX.models[model].shape
    assert (len(shape.layers), shape.num_experts, shape.top_k) == TABLE[model][:3]
    resolved = resolve(parse_request(request_text), [model.lower()], shape, Registry((folder,)))
    assert resolved is not None
    (source,) = resolved.sources
    assert (source.activate, source.deactivate) == TABLE[model][NUMBERS[request_text]]
    rules, dropped = expected_rules(model, request_text)
    assert np.array_equal(compile_rules(resolved.profile, shape).rules, rules)
    assert [(e.layer, e.expert) for e in source.dropped] == dropped
    assert (rules == ACTIVATE).sum() + len(dropped) == source.activate and (
        rules == DEACTIVATE
    ).sum() == source.deactivate


def test_qwens_defaults_in_figures(folder: Path) -> None:
    shape = INDEX.models["Qwen/Qwen3-30B-A3B"].shape
    figures = {}
    for text in ("faithfulness", "safety", "safety:reverse"):
        resolved = resolve(parse_request(text), ["Qwen/Qwen3-30B-A3B"], shape, Registry((folder,)))
        assert resolved is not None
        rules = compile_rules(resolved.profile, shape).rules
        figures[text] = (int((rules == ACTIVATE).sum()), int((rules == DEACTIVATE).sum()))
    assert figures == {"faithfulness": (0, 500), "safety": (15, 0), "safety:reverse": (5, 480)}


def test_only_one_row_of_the_table_meets_the_cap_of_a_layer() -> None:
    met = {row for row in ROWS if expected_rules(*row)[1]}
    assert met == {("mistralai/Mixtral-8x7B-Instruct-v0.1", "safe:reverse")}
    for model, request in ROWS:
        rules, _ = expected_rules(model, request)
        assert (rules == DEACTIVATE).sum(axis=1).max() <= TABLE[model][1] - TABLE[model][2]


@pytest.mark.parametrize("item", INDEX.rankings, ids=lambda item: f"{item.model} {item.behaviour}")
def test_counts_and_card_are_those_of_the_release(folder: Path, item: Any) -> None:
    found = Registry((folder,)).find([item.model], item.behaviour)
    counts, card = found.ranking.counts, found.ranking.card
    columns = plain_columns(item.model, item.behaviour)
    for side in (1, 2):
        grid = np.full((len(counts.layers), card.num_experts), -1.0)
        for layer, expert, number in zip(columns["layer"], columns["expert"], columns[f"a{side}"], strict=True):
            grid[layer, expert] = number
        assert np.array_equal(getattr(counts, f"activations_{side}"), grid)
        tokens = {a + d for a, d in zip(columns[f"a{side}"], columns[f"d{side}"], strict=True)}
        assert tokens == {counts.tokens[side - 1]}
        # The check that every ranking must pass holds for theirs, too, exactly.
        assert (grid.sum(axis=1) == card.top_k * counts.tokens[side - 1]).all()
    assert card.source is not None and card.source.sha256 == item.sha256
    assert card.safety == (item.behaviour == "safety") and "Noncommercial" in card.license
    assert (found.entry.path.parent / LICENSE_FILE).read_text().startswith("**ADOBE RESEARCH LICENSE**")


def check_order_and_sign(counts: RoutingCounts, columns: dict[str, list[Any]]) -> None:
    """Our ranking of counts against the rows of a table: the same experts, in the same order, on the same sides."""
    theirs = list(zip(columns["layer"], columns["expert"], columns["risk_diff"], strict=True))
    mine = [tuple(entry) for entry in rank_experts(counts)]
    signed = {(layer, expert): value for layer, expert, value in mine}
    assert len(mine) == len(theirs) == len(signed) == counts.activations_1.size
    assert all(signed[layer, expert] == pytest.approx(value, abs=1e-12) for layer, expert, value in theirs)
    sizes = [abs(value) for *_, value in theirs]
    for place, ((*found, _), (*wanted, _)) in enumerate(zip(mine, theirs, strict=True)):
        # Among equals the authors' order is chance; everywhere else there is one right expert for the place.
        around = [sizes[i] for i in (place - 1, place + 1) if 0 <= i < len(sizes)]
        if any(abs(size - sizes[place]) < 1e-12 for size in around):
            assert abs(abs(signed[tuple(found)]) - sizes[place]) < 1e-12, place
        else:
            assert found == wanted, place


@pytest.mark.parametrize("item", INDEX.rankings, ids=lambda item: f"{item.model} {item.behaviour}")
def test_our_order_from_their_counts_is_theirs_and_so_are_the_sides(folder: Path, item: Any) -> None:
    counts = _find(folder)(item).ranking.counts
    columns = plain_columns(item.model, item.behaviour)
    check_order_and_sign(counts, columns)
    assert min(columns["risk_diff"]) < 0 < max(columns["risk_diff"])
    # Sides that are swapped have the same absolute values.
    swapped = RoutingCounts(counts.activations_2, counts.activations_1, counts.tokens[::-1], counts.layers)
    with pytest.raises(AssertionError):
        check_order_and_sign(swapped, columns)


@pytest.mark.parametrize("model", TABLE)
def test_their_unequal_sides_would_be_cautioned_about(folder: Path, model: str) -> None:
    counts = Registry((folder,)).find([model], "safety").ranking.counts
    assert "differ in length" in cautions(counts, None)[0]
    assert np.isfinite(log_odds(counts)).all()


def test_converting_again_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    assert RELEASE is not None
    again = import_folder(INDEX, RELEASE, tmp_path, accept_license=True)
    hashes = {found.entry.name: found.sha256 for found in map(_find(folder), INDEX.rankings)}
    assert {f"{s.path.parts[-3]}/{s.path.parts[-2]}@1": s.sha256 for _, s in again} == hashes


def _find(folder: Path) -> Any:
    return lambda item: Registry((folder,)).find([item.model], item.behaviour)


def test_without_the_licence_nothing_is_imported(tmp_path: Path) -> None:
    assert RELEASE is not None
    with pytest.raises(PolicyError, match=r"Adobe Research License.*--accept-license"):
        import_folder(INDEX, RELEASE, tmp_path, accept_license=False)
    assert list(tmp_path.iterdir()) == []
