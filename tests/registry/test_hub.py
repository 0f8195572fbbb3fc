"""A data-set repository of the Hugging Face hub, served from this machine to the real `huggingface_hub`."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from expert_registry import Registry
from expert_registry.format import dump_ranking
from tests.support.folders import ROOT
from tests.support.loopback import Loopback
from tests.support.made_rankings import make_ranking

pytest.importorskip("huggingface_hub", reason="pulls from the hub")

COMMIT = "a" * 40
REPOSITORY = "org/rankings"
FILES = {
    "org--tiny-moe/digits/v1.safetensors": dump_ranking(make_ranking(1)),
    "org--tiny-moe/digits/v2.safetensors": dump_ranking(make_ranking(2, version=2)),
    "org--tiny-moe/safety/v1.safetensors": dump_ranking(make_ranking(3, behaviour="safety")),
    "other--model/digits/v1.safetensors": dump_ranking(make_ranking(4, model="other/model")),
    "README.md": b"# rankings",
    "org--tiny-moe/digits/evil.pkl": b"cos\nsystem\n(S'x'\ntR.",
}


def hub(files: dict[str, bytes], sizes: dict[str, int] | None = None) -> Loopback:
    """A server that speaks as much of the hub's protocol as a download needs."""

    def answer(request: BaseHTTPRequestHandler, data: bytes | None) -> bool:
        path = request.path.partition("?")[0]
        api = f"/api/datasets/{REPOSITORY}"
        if path.startswith(f"{api}/revision/"):
            Loopback.give(request, json.dumps({"id": REPOSITORY, "sha": COMMIT, "private": False}).encode())
        elif path == f"{api}/tree/{COMMIT}":
            listing = [
                {"type": "file", "path": name, "size": (sizes or {}).get(name, len(content)), "oid": "0" * 40}
                for name, content in files.items()
            ]
            Loopback.give(request, json.dumps(listing).encode(), Content_Type="application/json")
        elif path.startswith(f"/datasets/{REPOSITORY}/resolve/{COMMIT}/"):
            content = files.get(path.split(f"/resolve/{COMMIT}/")[1])
            etag = hashlib.sha256(content or b"").hexdigest()
            Loopback.give(request, content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
        else:
            return False
        return True

    return Loopback({}, answer)


def pull_from(server: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: `huggingface_hub` reads its environment when it is imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.rstrip("/"),
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "STEERMOE_REGISTRY": str(folder / "rankings"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, "-m", "vllm_steermoe_plugin", "registry", "pull", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
        cwd=ROOT,
    )


def test_the_rankings_of_a_model_are_pulled_checked_and_stored(tmp_path: Path) -> None:
    with hub(FILES) as server:
        done = pull_from(server.url, tmp_path, "Org/Tiny-MoE", "--hub", REPOSITORY, "--accept-license")
        assert done.returncode == 0, done.stderr
        assert not any("other--model" in path or "evil" in path for path, _ in server.requests)
    stored = sorted(path.relative_to(tmp_path / "rankings").as_posix() for path in (tmp_path / "rankings").rglob("v*"))
    assert stored == sorted(name for name in FILES if name.startswith("org--tiny-moe") and "evil" not in name)
    assert all((tmp_path / "rankings" / name).read_bytes() == FILES[name] for name in stored)
    assert Registry((tmp_path / "rankings",)).find(["org/tiny-moe"], "digits").entry.version == 2


def test_one_behaviour_at_a_revision_and_only_with_the_licence(tmp_path: Path) -> None:
    with hub(FILES) as server:
        done = pull_from(server.url, tmp_path, "org/tiny-moe", "safe", "--hub", f"{REPOSITORY}@v1.0")
        assert done.returncode == 1 and "--accept-license" in done.stderr and server.requests == []
        arguments = ("org/tiny-moe", "safe", "--hub", f"{REPOSITORY}@v1.0", "--accept-license")
        assert pull_from(server.url, tmp_path, *arguments).returncode == 0
        assert any(path.endswith("/revision/v1.0") for path, _ in server.requests)
    assert [entry.name for entry in Registry((tmp_path / "rankings",)).entries()] == ["org--tiny-moe/safety@1"]


@pytest.mark.parametrize(
    ("files", "sizes", "arguments", "names"),
    [
        (FILES, {}, ("org/tiny",), "unknown model 'org/tiny'"),
        (FILES, {}, ("org/tiny-moe", "truth"), "unknown behaviour 'truth'"),
        (FILES, {"org--tiny-moe/digits/v1.safetensors": 1 << 40}, ("org/tiny-moe",), "a ranking has at most"),
        ({"a--b/digits/v1.safetensors": b"junk"}, {}, ("a/b",), "not a ranking file"),
        (
            {"a--b/digits/v1.safetensors": FILES["org--tiny-moe/digits/v1.safetensors"]},
            {},
            ("a/b",),
            "says of itself that it is org/Tiny-MoE digits@1",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_not_stored(
    tmp_path: Path, files: dict[str, bytes], sizes: dict[str, int], arguments: tuple[str, ...], names: str
) -> None:
    with hub(files, sizes) as server:
        done = pull_from(server.url, tmp_path, *arguments, "--hub", REPOSITORY, "--accept-license")
    assert done.returncode == 1 and names in " ".join(done.stderr.split()), done.stderr
    assert not list((tmp_path / "rankings").rglob("v*")) and "Traceback" not in done.stderr


def test_a_repository_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with Loopback({}) as server:
        done = pull_from(server.url, tmp_path, "a/b", "--hub", "org/none", "--accept-license")
    assert done.returncode == 1 and "cannot read the data-set repository org/none" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    done = pull_from(server.url, tmp_path, "a/b", "--hub", "../none", "--accept-license")
    assert done.returncode == 1 and "Traceback" not in done.stderr
