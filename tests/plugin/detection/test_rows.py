"""One reader for all kinds of data files: what is a row, and where a bad one stands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from vllm_steermoe_plugin.detection.pairs import read_pairs
from vllm_steermoe_plugin.detection.rows import DataError, read_rows

ODD = "a\u2028b\u2029c\u0085d\fe\vf"
ROWS = [{"prompt": ODD, "n": "1"}, {"prompt": 'say "x", then y', "n": None}]
QUOTED = '"say ""x"", then y"'


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("name", "lines", "places"),
    [
        ("x.jsonl", [json.dumps(ROWS[0], ensure_ascii=False), "", json.dumps(ROWS[1])], ("line 1", "line 3")),
        ("x.json", [json.dumps(row, ensure_ascii=False) for row in ROWS], ("line 1", "line 2")),
        ("x.json", ["", json.dumps(ROWS, ensure_ascii=False, indent=1)], ("entry 1", "entry 2")),
        ("x", [json.dumps(ROWS)], ("entry 1", "entry 2")),
        ("x.csv", ["prompt,n", f"{ODD},1", "", f"{QUOTED},"], ("line 2", "line 3")),
    ],
)
def test_each_kind_of_text_is_read_from_any_system(
    tmp_path: Path, name: str, lines: list[str], places: tuple[str, str], end: str, mark: str
) -> None:
    for last in ("", end):
        found = list(read_rows(written(tmp_path, name, mark + end.join(lines) + last)))
        assert [row for _, row in found] == ROWS
        assert [place.partition(", ")[0] for place, _ in found] == [name] * 2
        if ".csv" not in name:
            assert tuple(place.partition(", ")[2] for place, _ in found) == places


def test_text_has_one_prompt_a_line_and_json_may_have_texts_as_rows(tmp_path: Path) -> None:
    for name, content in (
        ("x.txt", f"\ufeff{ODD}\r\n\r\n  two, three \n"),
        ("x.json", json.dumps([ODD, "two, three"])),
    ):
        rows = [row for _, row in read_rows(written(tmp_path, name, content))]
        assert rows == [{"prompt": ODD}, {"prompt": "two, three"}]


def test_a_quoted_field_keeps_its_newlines(tmp_path: Path) -> None:
    path = written(tmp_path, "x.csv", 'a,b\n"one\ntwo\r\nthree",x\nfour,y,z\n')
    rows = read_rows(path)
    assert next(rows) == ("x.csv, line 4", {"a": "one\ntwo\r\nthree", "b": "x"})
    with pytest.raises(DataError, match=r"x\.csv, line 5: other fields than the header's 2; .* quotes"):
        next(rows)


def test_parquet_is_read_and_its_absent_fields_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    chat = [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a", "name": None}]
    rows = [{"text_1": "one", "text_2": "two", "messages_1": None, "messages_2": None}]
    rows.append({"text_1": None, "text_2": None, "messages_1": chat, "messages_2": chat[::-1]})  # type: ignore[dict-item]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert next(read_rows(path)) == ("x.parquet, row 1", rows[0])
    one, two = read_pairs(path).pairs
    assert one.side_2.text == "two" and two.side_2.messages and two.side_2.messages[0].role == "assistant"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"x\.parquet, after row 0: not Parquet"):
        list(read_rows(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="'pyarrow', which is not installed"):
        list(read_rows(path))


def test_pairs_may_stand_in_csv(tmp_path: Path) -> None:
    path = written(tmp_path, "x.csv", 'text_1,text_2,target_1\n"one, two",three,\nfour,five,ou\n')
    one, two = read_pairs(path).pairs
    assert one.side_1.text == "one, two" and one.side_1.target is None and two.side_1.target == "ou"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": 1}\n{"a"', r"x\.jsonl, line 2: not JSON: .*column 5"),
        ("x.jsonl", '{"a": 1}\n[{"a": 1}]', "line 2: a row is an object or a text, got"),
        ("x.jsonl", '"a"\n{"b": {"c": 1, "c": 2}}', "line 2: not JSON: c stands twice"),
        ("x.jsonl", '{"a": 1}\n' + "[" * 100_000, "line 2: not JSON: .*recursion"),
        ("x.jsonl", b'"a"\n"\xff"', "line 2: not JSON"),
        ("x.json", '[\n{"a": 1},\n{"a"}]', r"x\.json: not JSON: .*line 3"),
        ("x.json", '[{"a": 1, "a": 2}]', "a stands twice"),
        ("x.json", "[1]", "entry 1: a row is an object or a text, got 1"),
        ("x.json", "[]", "no rows"),
        ("x.txt", b"a\n\xff\n", r"x\.txt, line 2 is not UTF-8"),
        ("x.txt", "\n \n", "no rows"),
        ("x.csv", "prompt\nsay, then\n", r"x\.csv, line 2: other fields than the header's 1"),
        ("x.csv", "a,b\n1,2\n3\n", "line 3: other fields"),
        ("x.csv", "a,\n1,2\n", "line 1: not CSV: the first line must name the columns"),
        ("x.csv", "a,a\n1,2\n", "line 1: not CSV: the first line must name the columns"),
        ("x.csv", 'a\n"b\n', "line 2: not CSV"),
        ("x.csv", "a\nb\rc\n", "line 2: not CSV"),
        ("x.csv", b"a\nb\n\xff\n", "line 3 is not UTF-8"),
        ("x.csv", "a\n", "no rows"),
    ],
)
def test_what_is_no_row_is_an_error_with_its_place(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_rows(written(tmp_path, name, content)))


def test_a_file_that_is_not_there_or_too_large_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(DataError, match="cannot read"):
            list(read_rows(path))
    monkeypatch.setattr("vllm_steermoe_plugin.detection.rows.MAX_ROWS", 2)
    with pytest.raises(DataError, match="more than 2 rows"):
        list(read_rows(written(tmp_path, "x.txt", "a\nb\nc\n")))
