"""Each error class has a code of its own, which its table names."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from expert_registry import errors
from expert_registry.errors import SteerMoEError, naming
from tests.support.folders import ROOT

PACKAGES = ("expert_registry", "vllm_steermoe_plugin", "lm_eval_tasks")


def classes(base: type[SteerMoEError]) -> Iterator[type[SteerMoEError]]:
    yield base
    for below in base.__subclasses__():
        yield from classes(below)


def test_each_error_class_has_its_own_code_and_the_table_has_all() -> None:
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        if re.search(r"^class \w+Error\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    ours = [kind for kind in classes(SteerMoEError) if kind.__module__.split(".")[0] in PACKAGES]
    table = re.findall(r"^    (STEERMOE-E\d{3})  (\w+)  ", errors.__doc__ or "", re.MULTILINE)
    assert sorted(table) == sorted((vars(kind)["code"], kind.__name__) for kind in ours)
    assert len({code for code, _ in table}) == len(table)


@pytest.mark.parametrize(
    ("paths", "public"),
    [
        (("/srv/rankings",), "cannot read rankings/a/b.json, see /srv/other"),
        (("/srv/rankings", "/srv/rankings/a"), "cannot read a/b.json, see /srv/other"),
        (("/srv/rankings/a/b.json", "/srv/other"), "cannot read b.json, see other"),
        ((".", "/", "rankings"), "cannot read /srv/rankings/a/b.json, see /srv/other"),
    ],
)
def test_the_public_message_leaves_out_where_files_are(paths: tuple[str, ...], public: str) -> None:
    text = "cannot read /srv/rankings/a/b.json, see /srv/other"
    with pytest.raises(SteerMoEError) as caught, naming(*map(Path, paths)):
        raise SteerMoEError(text)
    assert (str(caught.value), caught.value.public) == (text, public)
    assert copy.copy(caught.value).public == public
