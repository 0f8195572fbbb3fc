"""Steering files of other tools: what they say in numbers, and what is refused by name. All files are made up."""

from __future__ import annotations

import io
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from expert_registry import MoEShape
from expert_registry.errors import FileError, ProfileError, SteerMoEError, UsageError
from tests.support.refusals import not_refused
from vllm_steermoe_plugin.steering.interchange import ds4_signs
from vllm_steermoe_plugin.steering.interchange.ds4_signs import profile_of_signs
from vllm_steermoe_plugin.steering.interchange.easysteer import read_easysteer
from vllm_steermoe_plugin.steering.interchange.easysteer_writing import write_easysteer
from vllm_steermoe_plugin.steering.interchange.layer_ranges import parse_layers
from vllm_steermoe_plugin.steering.interchange.matrix import profile_of_matrix
from vllm_steermoe_plugin.steering.interchange.tensor_files import MAX_CELLS, read_matrix
from vllm_steermoe_plugin.steering.profile import SteeringProfile
from vllm_steermoe_plugin.steering.rules import compile_rules

EXPERTS = 8
LAYERS = (0, 1, 3, 12)
SHAPE = MoEShape("OlmoeForCausalLM", LAYERS, EXPERTS, 4)


def file(*, layers: dict[str, Any] | None = None, **layer: Any) -> str:
    return json.dumps({"layer_configs": {"3": layer} if layers is None else layers})


# --- EasySteer --------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=EXPERTS, max_size=EXPERTS),
    st.sets(st.integers(0, EXPERTS - 1), min_size=1),
    st.floats(-10, 10),
)
@settings(max_examples=100, deadline=None)
def test_a_soft_layer_adds_what_easysteer_adds(logits: list[float], ids: set[int], strength: float) -> None:
    z = np.array(logits)
    theirs = z.copy()
    theirs[sorted(ids)] += strength * math.sqrt(((z - z.mean()) ** 2).sum() / (EXPERTS - 1))
    profile = read_easysteer(file(mode="soft", expert_ids=sorted(ids), **{"lambda": strength}), EXPERTS)
    biases = compile_rules(profile, SHAPE).rules[SHAPE.rows[3]].astype(np.float64)
    # A bias has half precision: 11 bits, or steps of 2**-24.
    assert np.abs(z + biases * z.std() - theirs).max() <= (abs(strength) * 1.1 * 2**-11 + 2**-24) * z.std() + 1e-9


def test_the_other_modes_force_experts_and_lists_go_their_own_way() -> None:
    text = file(
        layers={
            "0": {"mode": "activate", "expert_ids": [2, 1]},
            "1": {"mode": "deactivate", "expert_ids": [0], "epsilon": 0.01},
            "3": {"mode": "deactivate", "expert_ids": [0], "activate_ids": [5], "deactivate_ids": [6]},
            "12": {"mode": "activate", "deactivate_ids": [7]},
        }
    )
    assert read_easysteer(text, EXPERTS) == SteeringProfile(
        activate=frozenset({(0, 1), (0, 2), (3, 5)}), deactivate=frozenset({(1, 0), (3, 0), (3, 6), (12, 7)})
    )


SOFT = {"mode": "soft", "expert_ids": [1], "lambda": 0.5}
FORCED = {"mode": "activate", "expert_ids": [1]}
NOT_EASYSTEERS: list[tuple[object, str]] = [
    *((text, "not JSON") for text in ("", "{", "layer_configs", "[" * 100_000, f'{{"a": {"9" * 5000}}}')),
    *((text, "an object whose 'layer_configs'") for text in ("[]", "null", "3", "{}", '{"layer_configs": []}')),
    ('{"layer_configs": {}}', "an object whose"),
    (" " * (1 << 20) + "{}", "characters; at most"),
    (json.dumps({"layer_configs": {"3": SOFT}, "phase": "both"}), "unknown key 'phase'"),
    *((text, "stands twice") for text in ('{"layer_configs": {}, "layer_configs": {}}', '{"a": {"3": 1, "3": 2}}')),
    *(
        (file(layers={key: SOFT}), "not a layer index")
        for key in ("-1", "03", "+3", "3.0", " 3", "\u0663", "", "all", "1" * 6)
    ),
    *((file(layers={"3": value}), "an object with a mode") for value in (None, [], "soft", {}, {"expert_ids": [1]})),
    *((file(**SOFT | {"mode": mode}), "an object with a mode") for mode in (None, 1, ["soft"], {})),
    *(
        (file(**SOFT | {"mode": mode}), f"mode {mode} .*versions")
        for mode in ("boost", "suppress", "soft_hard", "steermoe")
    ),
    (file(mode="soft_random", expert_ids=[1]), "mode soft_random .*for each token"),
    (file(mode="soft_topk", expert_ids=[1]), "mode soft_topk .*top-k that a token has by itself"),
    (file(**SOFT | {"mode": "sofft"}), "did you mean 'soft'"),
    *(
        (file(**SOFT | {key: [2]}), f"ignores {key} in mode soft")
        for key in ("activate_ids", "deactivate_ids", "epsilon")
    ),
    (file(**SOFT | {"scale": 1}), "unknown key in mode soft 'scale'"),
    (file(**FORCED | {"lambda": 1}), "unknown key in mode activate 'lambda'"),
    *((file(**FORCED | {"epsilon": value}), "epsilon is 0.01") for value in (0.02, 0, True, "0.01", None, [0.01])),
    *(
        (file(**config | {"expert_ids": ids}), "layer 3: expert_ids")
        for config in (SOFT, FORCED)
        for ids in ([], None, 1, "1", {"1": 1}, [True], [1.0], ["1"], [None], [-1], [EXPERTS], [1 << 70], [[1]])
    ),
    *((file(**config | {"expert_ids": [1, 2, 1]}), "stands twice in expert_ids") for config in (SOFT, FORCED)),
    (file(**FORCED | {"activate_ids": [1]}), "in expert_ids and in activate_ids"),
    (file(mode="deactivate"), "names no experts"),
    (file(mode="soft", **{"lambda": 1}), "names no experts"),
    (file(mode="soft", expert_ids=[1]), "without lambda, the strength is that of EasySteer's request"),
    *(
        (file(**SOFT | {"lambda": value}), "lambda must be a number")
        for value in (None, True, "1", [1], 16.5, -17, 10**400)
    ),
    *(
        (file(**SOFT).replace("0.5", value), "lambda must be|finite")
        for value in ("NaN", "Infinity", "-Infinity", "1e999")
    ),
]


def test_what_is_no_file_of_easysteer_is_refused_by_name() -> None:
    rows = ((text, UsageError, words) for text, words in NOT_EASYSTEERS)
    assert not_refused(lambda text: read_easysteer(text, EXPERTS), rows) == []
    contradictions = [
        (file(**FORCED | {"deactivate_ids": [1]}), "layer 3, expert 1 is to be activated and deactivated"),
        (file(**SOFT | {"lambda": 16}), "layer 3, expert 1"),  # 17.1 population deviations of 8 logits.
    ]
    assert not_refused(lambda text: read_easysteer(text, EXPERTS), contradictions, ProfileError) == []


@st.composite
def writable(draw: st.DrawFn) -> SteeringProfile:
    """Profiles in whose layers there is one bias for several experts, or only forced ones."""
    parts = []
    for layer in draw(st.sets(st.sampled_from(LAYERS), min_size=1)):
        ids = draw(st.permutations(range(EXPERTS)))
        up, down = draw(st.integers(0, 4)), draw(st.integers(1, 4))
        first, second = frozenset((layer, e) for e in ids[:up]), frozenset((layer, e) for e in ids[4 : 4 + down])
        bias = draw(st.floats(-15, 15, width=16).filter(bool))
        biased = SteeringProfile(bias=tuple((layer, expert, bias) for _, expert in first | second))
        parts.append(draw(st.sampled_from([SteeringProfile(first, second), biased])))
    return SteeringProfile.merge(parts)


@given(writable())
@settings(max_examples=100, deadline=None)
def test_what_is_written_for_easysteer_is_read_back_as_it_was(profile: SteeringProfile) -> None:
    text = write_easysteer(profile, EXPERTS)
    assert read_easysteer(text, EXPERTS) == profile
    assert write_easysteer(read_easysteer(text, EXPERTS), EXPERTS) == text


def test_what_easysteers_file_cannot_say_is_refused_with_the_layer() -> None:
    one, other = frozenset({(3, 1)}), frozenset({(3, 2)})
    rows: list[tuple[SteeringProfile, str]] = [
        (SteeringProfile(bias=((3, 1, 0.5), (3, 2, 0.25))), r"layer 3 has 2 .*from 0\.25 to 0\.5; .*by=sign"),
        (SteeringProfile(bias=((3, 1, 0.5), (3, 2, -0.5))), r"layer 3 .*from -0\.5 to 0\.5; .*both signs"),
        (SteeringProfile(one, bias=((3, 2, 0.5), (0, 1, 1.0))), r"layer 3 forces .*\[1\].*biases \(\{2: 0\.5\}\)"),
        (SteeringProfile(one, other, phase="prompt"), "phase=prompt: EasySteer's file has no phase; its requests"),
        (SteeringProfile(one, weight="own"), "weight=own"),
        (SteeringProfile(frozenset({(3, EXPERTS)})), f"no expert {EXPERTS}"),
        (SteeringProfile(bias=((3, 1, 0.0),)), "steers nothing"),
    ]
    assert not_refused(lambda profile: write_easysteer(profile, EXPERTS), rows, ProfileError) == []


# --- a matrix ---------------------------------------------------------------------------------------------------

DTYPES = ("<f2", "<f4", "<f8", ">f4")


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version, allow_pickle=True)
    return buffer.getvalue()


@given(st.data(), st.integers(1, 5), st.integers(1, 9), st.sampled_from(DTYPES), st.sampled_from("CF"))
@settings(max_examples=50, deadline=None)
def test_a_matrix_is_read_as_numpy_and_safetensors_write_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, rows: int, columns: int, dtype: str, order: Any
) -> None:
    seed = data.draw(st.integers(0, 1000))
    matrix = np.random.default_rng(seed).normal(size=(rows, columns)).astype(dtype, order=order)
    folder = tmp_path_factory.mktemp("matrix")
    files = {"a.npy": npy(matrix), "b.npy": npy(matrix, (2, 0)), "c.npy": npy(matrix, (3, 0))}
    if dtype[0] == "<":
        files["d.safetensors"] = save({"S": np.ascontiguousarray(matrix)})
    for name, content in files.items():
        (folder / name).write_bytes(content)
        found = read_matrix(folder / name)
        assert found.dtype == matrix.dtype and np.array_equal(found, matrix)


GOOD = npy(np.ones((2, 3), dtype="<f4"))


def header(text: bytes, body: bytes = b"\0" * 24, length: int | None = None) -> bytes:
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text) if length is None else length) + text + body


NO_MATRICES: list[tuple[str, bytes, str]] = [
    ("a.txt", GOOD, "read from .npy or .safetensors"),
    *(
        ("a.npy", data, "not a .npy file")
        for data in (b"", b"\x93NUMPY", GOOD[:11], b"PK" + GOOD, GOOD[:6] + b"\x09" + GOOD[7:])
    ),
    ("a.npy", npy(np.array([[None]], dtype=object)), "must hold one matrix"),
    ("a.npy", npy(np.array([[(1.0, 2.0)]], dtype="f4,f4")), "must hold one matrix"),
    *(("a.npy", npy(np.ones(shape, "<f4")), "must hold one matrix") for shape in ((), (6,), (1, 2, 3))),
    *(("a.npy", npy(np.ones((2, 3), dtype)), "must hold one matrix") for dtype in ("i4", "c8", "?", "u1", "S4", "f16")),
    ("a.npy", header(b"{" * 9000), "must hold one matrix"),
    ("a.npy", header(b"(" * 9000 + b"-" * 9000), "must hold one matrix"),
    (
        "a.npy",
        header(b"{'descr': __import__('os'), 'fortran_order': False, 'shape': (2, 3), }"),
        "must hold one matrix",
    ),
    ("a.npy", header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-2, 3), }"), "must hold one matrix"),
    ("a.npy", header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999, 999999999), }"), "1 to 262144"),
    ("a.npy", header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 3), }", b""), "1 to 262144"),
    ("a.npy", header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 4), }"), "24 bytes .*takes 32"),
    ("a.npy", header(b"", length=(1 << 32) - 1), "must hold one matrix"),
    *(("a.npy", data, "bytes of numbers") for data in (GOOD[:-1], GOOD + b"\0")),
    *(("a.npy", npy(np.array([[0, value]])), "row 0, column 1 is") for value in (np.nan, np.inf, -np.inf)),
    *(
        ("a.safetensors", data, "not a safetensors file")
        for data in (b"", b"{}", GOOD, struct.pack("<Q", 1 << 62) + b"{}")
    ),
    ("a.safetensors", save({}), "must hold one tensor.*holds 0"),
    ("a.safetensors", save({"a": np.ones((2, 3)), "b": np.ones((2, 3))}), "must hold one tensor.*holds 2"),
    ("a.safetensors", save({"S": np.ones((2, 3), np.int64)}), "must be float16, float32 or float64, got I64"),
    *(("a.safetensors", save({"S": np.ones(shape)}), "must hold a matrix") for shape in ((3,), (0, 3), (1, 2, 3))),
    ("a.safetensors", save({"S": np.array([[np.nan]])}), "row 0, column 0 is nan"),
]


def test_what_is_no_matrix_is_refused_without_being_evaluated(tmp_path: Path) -> None:
    def read(row: tuple[str, bytes]) -> None:
        (tmp_path / row[0]).write_bytes(row[1])
        read_matrix(tmp_path / row[0])

    assert not_refused(read, (((name, data), UsageError, words) for name, data, words in NO_MATRICES)) == []
    with (tmp_path / "large.npy").open("wb") as large:
        large.truncate(16 * MAX_CELLS)
    for missing in ("large.npy", "none.npy", "none.safetensors"):
        with pytest.raises(FileError):
            read_matrix(tmp_path / missing)


@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_a_damaged_matrix_is_refused_or_is_a_matrix(
    tmp_path_factory: pytest.TempPathFactory, at: int, more: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.npy"
    path.write_bytes(GOOD[:at] + more + GOOD[at + len(more) :])
    try:
        matrix = read_matrix(path)
    except UsageError:
        return
    assert matrix.ndim == 2 and np.isfinite(matrix).all()


def test_a_matrix_gives_the_biases_of_masking_in_its_own_precision() -> None:
    """As MASCing: absolute numbers up to 0.1 are zeroed in float32, the rest is multiplied by alpha."""
    matrix = np.array([[0.5, 0.1, -0.2, 0.0], [np.nextafter(np.float32(0.1), np.float32(1)), -0.1, 0, 2]], np.float32)
    assert profile_of_matrix(matrix, (1, 4), strength=2, threshold=0.1).bias == SteeringProfile(
        bias=((1, 0, 1.0), (1, 2, -0.4), (4, 0, 0.2), (4, 3, 4.0))
    ).bias  # fmt: skip
    assert {(layer, expert) for layer, expert, _ in profile_of_matrix(matrix, (1, 4)).bias} == {
        (layer, expert) for layer, row in ((1, matrix[0]), (4, matrix[1])) for expert in np.flatnonzero(row).tolist()
    }


def test_a_matrix_that_cannot_be_applied_is_refused() -> None:
    ones = np.ones((2, 4), np.float32)
    rows: list[tuple[dict[str, Any], type[SteerMoEError], str]] = [
        ({"layers": (1,)}, UsageError, "2 rows, but 1 layers"),
        ({"layers": (1, 2, 3)}, UsageError, "2 rows, but 3 layers"),
        *(({"strength": value}, UsageError, "not a finite number") for value in (math.nan, math.inf)),
        *(({"threshold": value}, UsageError, "must be a number from 0") for value in (math.nan, math.inf, -0.1)),
        *(({"threshold": value}, UsageError, "no number in the matrix is larger") for value in (1, 1e300)),
        *(({"strength": value}, ProfileError, "layer 1, expert 0") for value in (16.5, -1e308)),
        ({"matrix": np.full((2, 4), 1e308), "strength": 10}, ProfileError, "bias: inf for layer 1"),
    ]
    assert not_refused(lambda wrong: profile_of_matrix(**{"matrix": ones, "layers": (1, 2)} | wrong), rows) == []


def test_ranges_of_layers_ascend() -> None:
    assert parse_layers("1-3") == (1, 2, 3) and parse_layers("0, 2,4-5,12") == (0, 2, 4, 5, 12)
    bad = ("", ",", "1,", "3-1", "1,1", "2,1", "1-3,3", "-1", "1-", "a", "1-2-3", "1.5", "100000", "\u0663", "1;2")
    assert not_refused(parse_layers, ((text, UsageError, "ascending indices") for text in bad)) == []


# --- signs of ds4 -----------------------------------------------------------------------------------------------


def signs(*cells: tuple[int, int, float]) -> bytes:
    values = np.zeros((43, 256), "<f4")
    for layer, expert, value in cells:
        values[layer, expert] = value
    return values.tobytes()


def test_of_ds4s_map_only_the_sign_counts() -> None:
    profile = profile_of_signs(signs((3, 0, 1e-30), (42, 255, 7), (3, 1, -0.5), (20, 128, -0.0), (0, 0, -0.0)))
    assert profile == SteeringProfile(frozenset({(3, 0), (42, 255)}), frozenset({(3, 1)}))


def test_another_map_than_ds4s_is_refused() -> None:
    rows: list[tuple[bytes, type[SteerMoEError], str]] = [
        *(
            (data, UsageError, "takes? 44032|take 44032")
            for data in (b"", signs()[:-1], signs() + b"\0", signs()[:-1024])
        ),
        *((signs((5, 6, value)), UsageError, "layer 5, expert 6: .*not a finite") for value in (math.nan, math.inf)),
        *((signs((layer, 9, 1.0)), UsageError, f"layer {layer}, expert 9: .*hash") for layer in range(3)),
        (signs(), ProfileError, "names no expert"),
    ]
    assert ds4_signs.SIZE == 44032 and not_refused(profile_of_signs, rows) == []
