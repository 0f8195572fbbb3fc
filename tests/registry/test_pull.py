"""Pulling from a web server on this machine that is honest, broken or hostile, and from a folder."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import socket
import time
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from expert_registry import Registry
from expert_registry.errors import FileError, PolicyError, RankingFormatError, UnknownRankingError
from expert_registry.files import read_bounded
from expert_registry.format import content_hash
from expert_registry.published.download import DownloadError, download
from expert_registry.published.index import PullIndex, load_index
from expert_registry.published.pickle_tree import PickleRefusedError
from expert_registry.published.pull import import_folder, pull
from expert_registry.sharing import LICENSE_FILE
from tests.support.folders import RELEASED_DATA as DATA
from tests.support.loopback import Answer, Loopback
from tests.support.made_rankings import make_ranking
from tests.support.refusals import not_refused
from tests.support.released import LICENSE, MODEL, index_of

RANKING = make_ranking(7, layers=(0, 1, 2))
TABLES = {
    "safety": (DATA / "released-11-columns.pkl").read_bytes(),
    "faithfulness": (DATA / "released-31-columns.pkl").read_bytes(),
}
INDEX = index_of(TABLES, RANKING)
BYTES = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(BYTES).hexdigest()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def release(root: str = "/mirror/") -> dict[str, bytes]:
    files = {f"{root}tables/[{name}].pkl": data for name, data in TABLES.items()}
    return {**files, f"{root}LICENSE": LICENSE}


# --- pull -------------------------------------------------------------------------------------------------------


def test_a_pulled_ranking_is_found_with_its_counts_card_and_licence(tmp_path: Path) -> None:
    seen: list[int] = []
    with Loopback(release()) as server:
        stored = pull(
            INDEX,
            INDEX.find("ORG/tiny-moe"),
            tmp_path,
            accept_license=True,
            base_url=server.url + "mirror",
            advance=seen.append,
        )
        again = pull(INDEX, INDEX.find(MODEL), tmp_path, accept_license=True, base_url=server.url + "mirror/")
    assert sum(seen) == sum(len(data) for data in TABLES.values())
    assert [s.new for s in stored] == [True, True] and [s.new for s in again] == [False, False]
    for behaviour in ("safe", "faithful"):
        found = Registry((tmp_path,)).find([MODEL], behaviour, shape=RANKING.shape)
        assert np.array_equal(found.ranking.counts.activations_1, RANKING.counts.activations_1)
        card = found.ranking.card
        assert card.source is not None and card.source.sha256 == hashlib.sha256(TABLES[card.behaviour]).hexdigest()
        assert card.license == "Made-up licence: Anything." and card.safety == (behaviour == "safe")
        assert (card.recommended.activate, card.recommended.deactivate) == (1, 3)
        assert (found.entry.path.parent / LICENSE_FILE).read_bytes() == LICENSE
    assert not any(path.is_file() for path in (tmp_path / ".unfinished").iterdir())
    assert len(list(Registry((tmp_path,)).entries())) == 2


def test_the_address_in_the_index_is_used_by_default(tmp_path: Path) -> None:
    with Loopback(release("/pinned/")) as server:
        index = index_of(TABLES, RANKING, server.url + "pinned/")
        assert len(pull(index, index.find(MODEL, "safe"), tmp_path, accept_license=True)) == 1
        assert [path for path, _ in server.requests] == ["/pinned/LICENSE", "/pinned/tables/[safety].pkl"]


def test_nothing_is_fetched_before_the_licence_is_accepted(tmp_path: Path) -> None:
    with Loopback(release()) as server:
        with pytest.raises(PolicyError, match=r"Made-up licence: Anything\. Nothing was stored.*--accept-license"):
            pull(INDEX, INDEX.find(MODEL), tmp_path, accept_license=False, base_url=server.url + "mirror")
        assert server.requests == [] and list(tmp_path.iterdir()) == []


def test_what_the_index_has_not_is_named() -> None:
    with pytest.raises(UnknownRankingError, match=r"nothing to pull.*did you mean 'org/Tiny-MoE'"):
        INDEX.find("org/tiny")
    with pytest.raises(UnknownRankingError, match=r"unknown behaviour 'digits'; known: faithfulness, safety"):
        INDEX.find(MODEL, "digits")


def test_a_hostile_table_with_the_right_hash_is_refused_all_the_same(tmp_path: Path) -> None:
    evil = b"cos\nsystem\n(S'touch x'\ntR."
    index = index_of({"safety": evil}, RANKING)
    with Loopback({"/tables/[safety].pkl": evil, "/LICENSE": LICENSE}) as server, pytest.raises(PickleRefusedError):
        pull(index, index.find(MODEL), tmp_path, accept_license=True, base_url=server.url)
    assert list(Registry((tmp_path,)).entries()) == []


# --- download ---------------------------------------------------------------------------------------------------


def fetch(url: str, part: Path, size: int = len(BYTES), sha256: str = DIGEST) -> bytes:
    return download(url, part, size=size, sha256=sha256, timeout=2)


def cut_after(number: int) -> Answer:
    def answer(request: BaseHTTPRequestHandler, data: bytes | None) -> bool:
        assert data is not None
        if request.headers.get("Range"):
            return False
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data[:number])
        return True

    return answer


def test_a_download_that_was_cut_off_goes_on_where_it_was(tmp_path: Path) -> None:
    with Loopback({"/a": BYTES}, cut_after(100_000)) as server:
        with pytest.raises(DownloadError, match=r"100000 of 256000 bytes.*again"):
            fetch(server.url + "a", tmp_path / "part")
        assert (tmp_path / "part").read_bytes() == BYTES[:100_000]
        seen: list[int] = []
        data = download(
            server.url + "a", tmp_path / "part", size=len(BYTES), sha256=DIGEST, advance=seen.append, timeout=2
        )
        assert data == BYTES and sum(seen) == len(BYTES) and seen[0] == 100_000
        assert server.requests == [("/a", None), ("/a", "bytes=100000-")]
    assert not (tmp_path / "part").exists()


@pytest.mark.parametrize("answer", ["ignores the range", "sends another range"])
def test_a_server_that_does_not_go_on_is_read_from_the_start(tmp_path: Path, answer: str) -> None:
    def misbehave(request: BaseHTTPRequestHandler, data: bytes | None) -> bool:
        request.send_response(200 if answer == "ignores the range" else 206)
        request.send_header("Content-Length", str(len(BYTES)))
        if answer == "sends another range":
            request.send_header("Content-Range", f"bytes 0-{len(BYTES) - 1}/{len(BYTES)}")
        request.end_headers()
        request.wfile.write(BYTES)
        return True

    (tmp_path / "part").write_bytes(BYTES[:1000])
    with Loopback({"/a": BYTES}, misbehave) as server:
        assert fetch(server.url + "a", tmp_path / "part") == BYTES


def test_a_kept_beginning_of_another_file_is_noticed_and_thrown_away(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(b"x" * 1000)
    with Loopback({"/a": BYTES}) as server:
        with pytest.raises(DownloadError, match="not the expected file"):
            fetch(server.url + "a", tmp_path / "part")
        assert fetch(server.url + "a", tmp_path / "part") == BYTES
        (tmp_path / "part").write_bytes(b"x" * (len(BYTES) + 1))
        assert fetch(server.url + "a", tmp_path / "part") == BYTES
        (tmp_path / "part").write_bytes(BYTES)
        before = len(server.requests)
        assert fetch(server.url + "a", tmp_path / "part") == BYTES and len(server.requests) == before


@pytest.mark.parametrize(
    ("served", "names"),
    [
        (BYTES[:-1] + b"x", rf"its sha256 is [0-9a-f]{{64}}, the index says {DIGEST}"),
        (BYTES + b"x", "longer than the 256000 bytes"),
        (BYTES[:-1], r"cut off after 255999 of 256000"),
        (None, "answers 404"),
    ],
)
def test_another_file_is_refused_and_nothing_of_it_is_stored(tmp_path: Path, served: bytes | None, names: str) -> None:
    with Loopback({"/a": served} if served is not None else {}) as server, pytest.raises(DownloadError, match=names):
        fetch(server.url + "a", tmp_path / "part")
    left = (tmp_path / "part").stat().st_size if (tmp_path / "part").exists() else 0
    assert left == (len(BYTES) - 1 if served == BYTES[:-1] else 0)


def test_no_more_than_the_size_is_read_of_an_endless_answer(tmp_path: Path) -> None:
    sent = 0

    def endless(request: BaseHTTPRequestHandler, data: bytes | None) -> bool:
        nonlocal sent
        request.send_response(200)
        request.end_headers()
        try:
            while sent < 1 << 28:
                request.wfile.write(b"x" * 65536)
                sent += 65536
        except OSError:
            pass
        return True

    with Loopback({}, endless) as server, pytest.raises(DownloadError, match="longer"):
        fetch(server.url + "a", tmp_path / "part")
    assert sent < 1 << 26


def test_a_server_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(DownloadError, match="timed out"):
        download(f"http://127.0.0.1:{silent.getsockname()[1]}/a", tmp_path / "p", size=1, sha256=DIGEST, timeout=0.3)


def test_without_a_network_the_error_says_what_else_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as once:
        port = once.getsockname()[1]
    with pytest.raises(DownloadError, match=r"cannot fetch.*steermoe registry import DIR"):
        fetch(f"http://127.0.0.1:{port}/a", tmp_path / "part")
    with pytest.raises(DownloadError, match="cannot fetch"):
        fetch("http://name.invalid/a", tmp_path / "part")


def redirect_to(place: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler, data: bytes | None) -> bool:
        if data is not None:
            return False
        request.send_response(302)
        request.send_header("Location", place)
        request.send_header("Content-Length", "0")
        request.end_headers()
        return True

    return answer


def test_a_redirect_is_followed_also_when_going_on(tmp_path: Path) -> None:
    with Loopback({"/a": BYTES}, redirect_to("/a")) as server:
        assert fetch(server.url + "old", tmp_path / "part") == BYTES
        (tmp_path / "part").write_bytes(BYTES[:5])
        assert fetch(server.url + "old", tmp_path / "part") == BYTES
        assert server.requests[-1] == ("/a", "bytes=5-")


def test_a_redirect_or_an_address_to_nowhere_good_is_refused(tmp_path: Path) -> None:
    for place in ("/loop", "file:///etc/passwd", "ftp://127.0.0.1/a", "data:,x"):
        with Loopback({}, redirect_to(place)) as server, pytest.raises(DownloadError):
            fetch(server.url + "old", tmp_path / "part")
    for url in ("file:///etc/passwd", "ftp://x/y", "/etc/passwd", "", "javascript:1"):
        with pytest.raises(DownloadError, match="not an http"):
            fetch(url, tmp_path / "part")


def test_a_redirect_does_not_leave_https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        onward = {"/down": "http://example.org/a", "/on": "https://example.org/a"}.get(request.url.path)
        return (
            httpx.Response(302, headers={"Location": onward})
            if onward
            else httpx.Response(200, stream=httpx.ByteStream(BYTES))
        )

    seen: list[str] = []
    monkeypatch.setattr(httpx, "Client", partial(httpx.Client, transport=httpx.MockTransport(answer)))
    with pytest.raises(DownloadError, match="which is not followed"):
        fetch("https://example.org/down", tmp_path / "part")
    assert seen == ["https://example.org/down"]
    assert fetch("https://example.org/on", tmp_path / "part") == BYTES


def _pull(url: str, folder: Path) -> list[bool]:
    return [stored.new for stored in pull(INDEX, INDEX.find(MODEL), folder, accept_license=True, base_url=url)]


def test_processes_that_pull_at_once_store_each_ranking_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with Loopback(release("/")) as server, context.Pool(4) as pool:
        outcomes = pool.starmap(_pull, [(server.url, tmp_path)] * 4, chunksize=1)
    assert [sum(outcome[i] for outcome in outcomes) for i in range(2)] == [1, 1]
    assert Registry((tmp_path,)).find([MODEL], "safe").ranking.card.behaviour == "safety"


def _fetch_into(url: str, part: Path) -> bool:
    return download(url, part, size=len(BYTES), sha256=DIGEST, timeout=20) == BYTES


def test_processes_that_share_an_unfinished_file_wait_for_each_other(tmp_path: Path) -> None:
    def slowly(request: BaseHTTPRequestHandler, data: bytes | None) -> bool:
        assert data is not None
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        for start in range(0, len(data), 32_000):
            request.wfile.write(data[start : start + 32_000])
            time.sleep(0.05)
        return True

    context = multiprocessing.get_context("fork")
    with Loopback({"/a": BYTES}, slowly) as server, context.Pool(3) as pool:
        assert pool.starmap(_fetch_into, [(server.url + "a", tmp_path / "part")] * 3, chunksize=1) == [True] * 3
    assert not (tmp_path / "part").exists()


# --- import -----------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    folder = tmp_path / "release"
    folder.mkdir()
    for name, data in TABLES.items():
        (folder / f"[{name}].pkl").write_bytes(data)
    (folder / "LICENSE").write_bytes(LICENSE)
    (folder / "notes.txt").write_text("left alone")
    return folder


def test_files_at_hand_give_the_same_rankings_as_the_network(directory: Path, tmp_path: Path) -> None:
    with Loopback(release("/")) as server:
        pulled = pull(INDEX, INDEX.find(MODEL), tmp_path / "a", accept_license=True, base_url=server.url)
    imported = import_folder(INDEX, directory, tmp_path / "b", accept_license=True)
    assert [stored.sha256 for stored in pulled] == [stored.sha256 for _, stored in imported]
    assert all(content_hash(stored.path.read_bytes()) == stored.sha256 for stored in pulled)
    (directory / "[safety].pkl").unlink()
    ((item, _),) = import_folder(INDEX, directory, tmp_path / "c", accept_license=True)
    assert item.behaviour == "faithfulness", "a part of the files is enough"


def test_other_files_are_refused(directory: Path, tmp_path: Path) -> None:
    table, licence = directory / "[safety].pkl", directory / "LICENSE"
    rows: list[tuple[Any, ...]] = [
        ((table, TABLES["safety"][:-1]), DownloadError, "not the published file"),
        ((table, TABLES["safety"] + b"x"), FileError, "larger"),
        ((licence, b"x" * len(LICENSE)), DownloadError, "LICENSE is not the published"),
        ((licence, None), FileError, "cannot read.*LICENSE"),
    ]

    def import_with(change: tuple[Path, bytes | None]) -> None:
        path, data = change
        whole = path.read_bytes()
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        try:
            import_folder(INDEX, directory, tmp_path / "b", accept_license=True)
        finally:
            path.write_bytes(whole)

    assert not_refused(import_with, rows) == []
    for path in directory.glob("*.pkl"):
        path.unlink()
    with pytest.raises(UnknownRankingError, match="holds no file of the index"):
        import_folder(INDEX, directory, tmp_path / "b", accept_license=True)


# --- index ------------------------------------------------------------------------------------------------------


def test_the_index_of_the_package_names_six_models_and_both_behaviours() -> None:
    index = load_index()
    assert len(index.rankings) == 12 and len(index.models) == 6
    assert {item.behaviour for item in index.rankings} == {"faithfulness", "safety"}
    for source in index.sources.values():
        assert source.base_url.startswith("https://") and source.revision in source.base_url
    for item in index.rankings:
        card = index.card(item)
        assert card.source is not None and card.safety == (item.behaviour == "safety")
        assert index.models[item.model].shape.num_experts == card.num_experts


def test_a_hostile_index_is_refused_by_name(tmp_path: Path) -> None:
    def load(changes: dict[str, object]) -> None:
        fields = INDEX.model_dump(mode="json")
        fields["rankings"][0] |= changes
        (tmp_path / "index.json").write_text(json.dumps(fields))
        load_index(tmp_path / "index.json")

    rows: list[tuple[Any, ...]] = [
        *(({"path": path}, "path") for path in ("../x", "/etc/passwd", "a//b", "a/./b", "a?x=b")),
        ({"size": 1 << 40}, "size"),
        ({"sha256": "x"}, "sha256"),
        ({"model": "../x"}, "model"),
        ({"behaviour": "None"}, "behaviour"),
        ({"source": "elsewhere"}, "names a source"),
        ({"surprise": 1}, "surprise"),
    ]
    assert not_refused(load, rows, RankingFormatError) == []
    assert isinstance(load_index(), PullIndex)
    with pytest.raises(FileError, match="larger"):
        read_bounded(tmp_path / "index.json", 10)
