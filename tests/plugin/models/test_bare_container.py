"""An engine that steers nothing starts without a home folder, and where it cannot look into its directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from expert_registry import Registry
from expert_registry.errors import RankingFormatError
from expert_registry.places import BUNDLED, USER_FOLDER_VARIABLE, user_folder
from vllm_steermoe_plugin.models import lab_checkpoint
from vllm_steermoe_plugin.models.checkpoints import names_of, revision_of


@pytest.fixture
def _no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(USER_FOLDER_VARIABLE)
    monkeypatch.setattr(Path, "home", home)


@pytest.fixture
def _closed_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that runs as root may look into everything, so the refusal is made here."""
    original = Path.stat

    def stat(path: Path, **options: bool) -> object:
        if not path.is_absolute() or path.is_relative_to(Path.cwd() / ".steermoe"):
            raise PermissionError(13, "Permission denied")
        return original(path, **options)

    monkeypatch.setattr(Path, "stat", stat)


@pytest.mark.usefixtures("_no_home")
def test_without_a_home_the_bundled_rankings_are_found() -> None:
    assert Registry.default().folders == (BUNDLED,)
    assert Registry.default().find([lab_checkpoint.NAME], "digits").ranking.card.behaviour == "digits"
    with pytest.raises(RankingFormatError, match=f"no home folder for rankings; set {USER_FOLDER_VARIABLE}"):
        user_folder()


@pytest.mark.usefixtures("_closed_directory")
def test_a_directory_that_cannot_be_looked_into_is_no_obstacle() -> None:
    assert Registry.default().folders[-1] == BUNDLED
    assert names_of("owner/name") == ["owner/name"] and revision_of("owner/name") == ""


def test_a_name_that_no_file_can_have_is_a_name() -> None:
    long = "x" * 5000
    assert names_of(long) == [long] and revision_of(long) == ""
