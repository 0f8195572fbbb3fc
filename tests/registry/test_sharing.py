"""Golden files, and rankings on their way between folders: immutable, whole, and safe from several processes."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from expert_registry import MoEShape, Ranking, Registry, read_ranking
from expert_registry.card import SourceRef
from expert_registry.compare import compare_rankings
from expert_registry.errors import RankingFormatError
from expert_registry.format import content_hash, dump_ranking
from expert_registry.lock import Pin, read_lock, write_lock
from expert_registry.places import BUNDLED
from expert_registry.registry import publish
from expert_registry.sharing import LICENSE_FILE, share, store, store_converted
from tests.support.folders import RELEASED_DATA as DATA
from tests.support.made_rankings import make_ranking
from tests.support.released import LICENSE

MODEL = "org/Tiny-MoE"
SOURCE = SourceRef(repository="org/release", revision="0" * 40, path="a.pkl", sha256="0" * 64)


# --- golden files -----------------------------------------------------------------------------------------------


def test_a_golden_file_is_read_as_it_was_written() -> None:
    for name in ["ranking-v1", "ranking-v1-converted", "ranking-v2"]:
        data = (DATA / f"{name}.safetensors").read_bytes()
        expected = json.loads((DATA / f"{name}.json").read_text())
        ranking = read_ranking(DATA / f"{name}.safetensors")
        assert content_hash(data) == expected["sha256"]
        assert type(ranking.card).model_validate_json(json.dumps(expected["card"])) == ranking.card
        assert ranking.counts.activations_1.tolist() == expected["activations_1"]
        assert ranking.counts.activations_2.tolist() == expected["activations_2"]
        assert ranking.counts.tokens.tolist() == expected["tokens"]
        assert (None if ranking.weights is None else ranking.weights.tolist()) == expected.get("weights")
        assert [list(e[:2]) for e in ranking.experts()] == expected["order"]
        assert dump_ranking(ranking) == data


def test_the_bundled_rankings_keep_their_bytes() -> None:
    paths = sorted(BUNDLED.rglob("*.safetensors"))
    assert len(paths) >= 3
    for path in paths:
        assert dump_ranking(read_ranking(path)) == path.read_bytes()


# --- store and share --------------------------------------------------------------------------------------------


def test_storing_the_same_twice_is_no_error_and_another_is_refused(tmp_path: Path) -> None:
    data = dump_ranking(make_ranking(1))
    first, second = store(data, tmp_path, "a"), store(data, tmp_path, "a")
    assert (first.new, second.new) == (True, False) and first.path == second.path and first.sha256 == second.sha256
    with pytest.raises(RankingFormatError, match="immutable"):
        store(dump_ranking(make_ranking(2)), tmp_path, "b")
    assert first.path.read_bytes() == data
    with pytest.raises(RankingFormatError, match="nonsense"):
        store(b"nonsense", tmp_path, "nonsense")


def test_sharing_copies_the_bytes_and_the_licence(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    plain = make_ranking(1)
    converted = Ranking(plain.counts, plain.card.model_copy(update={"behaviour": "safety", "source": SOURCE}))
    publish(plain, mine)
    store_converted(converted, LICENSE, mine)
    for entry in Registry((mine,)).entries():
        if entry.behaviour == "safety":
            with pytest.raises(RankingFormatError, match=r"converted from org/release and is not yours"):
                share(entry, theirs)
            assert not (theirs / "org--tiny-moe" / "safety").exists()
        assert share(entry, theirs, converted=True).path.read_bytes() == entry.path.read_bytes()
    assert (theirs / "org--tiny-moe" / "safety" / LICENSE_FILE).read_bytes() == LICENSE
    assert not (theirs / "org--tiny-moe" / "digits" / LICENSE_FILE).exists()
    assert Registry((theirs,)).find([MODEL], "safety").ranking.card.source == SOURCE


# --- processes --------------------------------------------------------------------------------------------------


def _publish(folder: Path, seed: int, version: int, barrier: object) -> str:
    barrier.wait()  # type: ignore[attr-defined]
    try:
        publish(make_ranking(seed, version=version, experts=64, layers=tuple(range(8))), folder)
    except RankingFormatError as error:
        return str(error)
    return "won"


def _lock(path: Path, number: int, barrier: object) -> str:
    barrier.wait()  # type: ignore[attr-defined]
    for _ in range(20):
        write_lock(path, {f"model-{i}/digits": Pin(version=number, sha256=f"{number:064x}") for i in range(200)})
        assert len({pin.version for pin in read_lock(path).rankings.values()}) == 1
    return "won"


def test_of_processes_that_publish_one_version_exactly_one_wins(tmp_path: Path) -> None:
    workers, rounds = 4, 5
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, context.Pool(workers) as pool:
        barrier = manager.Barrier(workers)
        for version in range(1, rounds + 1):
            jobs = [(tmp_path, seed, version, barrier) for seed in range(workers)]
            outcomes = pool.starmap(_publish, jobs, chunksize=1)
            assert outcomes.count("won") == 1, outcomes
            assert all("immutable" in outcome for outcome in outcomes if outcome != "won")
            winner = make_ranking(outcomes.index("won"), version=version, experts=64, layers=tuple(range(8)))
            found = Registry((tmp_path,)).find([MODEL], "digits", version=version)
            assert dump_ranking(found.ranking) == dump_ranking(winner)
    place = tmp_path / "org--tiny-moe" / "digits"
    assert sorted(path.name for path in place.iterdir()) == [f"v{n}.safetensors" for n in range(1, rounds + 1)]


def test_a_lock_file_is_whole_whoever_writes_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, context.Pool(3) as pool:
        barrier = manager.Barrier(3)
        jobs = [(tmp_path / "steermoe.lock", n, barrier) for n in (1, 2, 3)]
        assert pool.starmap(_lock, jobs, chunksize=1) == ["won"] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["steermoe.lock"]


# --- compare ----------------------------------------------------------------------------------------------------


def test_a_ranking_differs_in_nothing_from_itself_and_in_what_was_changed_from_another() -> None:
    one = make_ranking(1)
    same = compare_rankings(one, one, top=5)
    assert same.card == {} and same.shared == same.top == 5 and same.largest_change[2] == same.largest_change[3]
    swapped = one.counts.activations_1.copy()
    swapped[1, [0, 5]] = swapped[1, [5, 0]]
    counts = one.counts.__class__(swapped, one.counts.activations_2, one.counts.tokens, one.counts.layers)
    two = Ranking(counts, one.card.model_copy(update={"note": "swapped"}))
    compared = compare_rankings(one, two, top=18)
    assert compared.card == {"note": ("", "swapped")} and compared.shared == 17, "one of the two no longer differs"
    layer, expert, before, after = compared.largest_change
    change = abs(one.counts.risk_difference() - two.counts.risk_difference())
    assert layer == 1 and expert in (0, 5) and abs(after - before) == pytest.approx(np.max(change))
    assert compare_rankings(two, one, top=18).largest_change == (layer, expert, after, before)


def test_rankings_of_other_shapes_are_compared_by_their_cards_only() -> None:
    compared = compare_rankings(make_ranking(1), make_ranking(1, experts=7), top=5)
    assert compared.shared is None and compared.largest_change is None and "num_experts" in compared.card
    assert MoEShape("A", (0,), 2, 1).differences(MoEShape("A", (0,), 2, 1)) == []
