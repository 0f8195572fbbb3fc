"""Quantised checkpoints in the real engine, each against transformers with the values that are stored in it.

Every stored value is one that bfloat16 holds (`support/quantise.py`), so an engine with the quantised checkpoint and
one with these values as they are compute the same, but for roundings. How far these can take a log-probability is
measured as in `test_bfloat16.py`: the reference, in float64, is run under `Roundings`, which puts each rounded result
off by a whole unit roundoff, and inputs that are rounded to 8 bits by half a level. In units of the deviation s that
this gives, up to the first token that selects other experts because two of its scores nearly tie:

* no error of an engine exceeds `FURTHEST` (by Hoeffding's inequality, see there);
* the mean of their squares is at most 1 (`SPREAD`), which it is if each rounding is as wrong as it can be.

Few processors have the kernels of vLLM's quantised experts. On others stand-ins multiply (`support/amx_stand_ins.py`),
and all around them is vLLM's. With those kernels log-probabilities are not compared: they round the inputs of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.alone import run_alone
from tests.support.corrected import CorrectedReference
from tests.support.oracle import ReferenceModel, forced, same_until
from tests.support.quantise import inputs_rounded
from tests.support.run_quantised import CASES, LENGTH, OPTIONS, SETTINGS, Quantised, look_at, requests
from vllm_steermoe_plugin.models.checkpoints import shape_in

SPREAD, FURTHEST = 1.0, 8.0
COPIES = 32
EACH_TIME = ("int8 beside experts, gate", "int8 beside experts, corrected")
"""One for each seam, with vLLM's own kernels; the others run each night."""
RUN = [name if name in EACH_TIME else pytest.param(name, marks=pytest.mark.nightly) for name in CASES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantised")


@pytest.fixture(scope="module")
def alone(request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    """What `run_quantised` saw of those cases that are asked for, in a process with stand-ins."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = {each.get("name") for each in params}
    names = [name for name, case in CASES.items() if case.stand_ins and name in asked]
    script = "import sys; from tests.support import run_quantised; run_quantised.main(*sys.argv[1:])"
    found: dict[str, Any] = run_alone(script, str(folder), *names)
    return found


@pytest.fixture(scope="module")
def seen(folder: Path, engines: Callable[..., Any], request: pytest.FixtureRequest) -> Callable[[str], dict[str, Any]]:
    """`seen(name)` is what an engine with that case answered."""
    kept: dict[str, Any] = {}

    def get(name: str) -> dict[str, Any]:
        if CASES[name].stand_ins:
            kept.update(request.getfixturevalue("alone"))
        elif name not in kept:
            _, stored, _ = CASES[name].write(folder / name)
            kept[name] = look_at(engines(str(stored), SETTINGS, **OPTIONS, **dict(CASES[name].options)), stored)
        found: dict[str, Any] = kept[name]
        assert "error" not in found, found["error"]
        return found

    return get


@pytest.mark.parametrize("name", RUN)
def test_unsteered_requests_are_as_without_the_plugin_and_rules_are_always_obeyed(
    name: str, seen: Callable[[str], dict[str, Any]], folder: Path
) -> None:
    found, case = seen(name), CASES[name]
    assert all(experts.endswith(case.experts) for experts in found["experts"]) and not found["monolithic"]
    assert found["gates"] == [case.gate] and found["corrects"] == case.corrects
    assert found["as_stock"]
    _, stored, _ = case.write(folder / name)
    shape = shape_in(stored)
    selections = np.array(found["selections"])
    assert (selections <= 1).all() and (selections.sum(-1) == shape.top_k).all()
    for request, (_, rules) in enumerate(requests(stored)):
        for (layer, expert), rule in forced(rules).items():
            assert (selections[request, :, shape.layers.index(layer), expert] == (rule > 0)).all(), (request, layer)


@pytest.mark.parametrize("name", RUN)
def test_logprobs_are_those_of_the_stored_values_as_far_as_rounding_allows(
    name: str, seen: Callable[[str], dict[str, Any]], folder: Path, request: pytest.FixtureRequest
) -> None:
    found, case = seen(name), CASES[name]
    if case.stand_ins and not request.getfixturevalue("alone")["stand_ins"]:
        pytest.skip("this processor has the kernels, which round the inputs of experts")
    source, stored, values = case.write(folder / name)
    errors = compare(case, found, values)
    assert len(errors) > 0.4 * len(requests(stored)) * LENGTH, "too little was compared"
    assert np.mean(np.square(errors)) <= SPREAD
    assert np.abs(errors).max() <= FURTHEST
    # It would be noticed if an engine had other values.
    assert np.mean(np.square(compare(case, found, source))) > SPREAD


def compare(case: Quantised, found: dict[str, Any], folder: Path) -> list[float]:
    """Errors of log-probabilities in units of s, if the engine had the weights in `folder`."""
    reference = reference_of(case, folder)
    layers = shape_in(folder).layers
    errors: list[float] = []
    for (ids, rules), logprobs, selections in zip(
        requests(folder), np.array(found["logprobs"]), np.array(found["selections"]), strict=True
    ):
        exact, chosen = reference.run(ids, rules)
        with inputs_rounded(reference.model, case.scheme):
            rounded, each = reference.run_rounded(ids, rules, COPIES)
        mine = {at: [np.flatnonzero(t).tolist() for t in selections[:, row]] for row, at in enumerate(layers)}
        copies = [{at: each[at][n * LENGTH : (n + 1) * LENGTH] for at in each} for n in range(COPIES)]
        until = np.array([same_until(chosen, copy) for copy in copies])
        # The log-probability of token i + 1 hangs on tokens up to i only.
        for i in range(min(same_until(chosen, mine), LENGTH - 1)):
            token = ids[i + 1]
            alike = rounded[until > i, i, token] - exact[i, token]
            if len(alike) >= COPIES / 2:
                errors.append((logprobs[i] - exact[i, token].item()) / alike.square().mean().sqrt().item())
    return errors


def reference_of(case: Quantised, values: Path) -> ReferenceModel | CorrectedReference:
    if case.corrects:
        return CorrectedReference(case.architecture, values, torch.float64, torch.bfloat16)
    return ReferenceModel(values, torch.float64, torch.bfloat16, log_softmax=False)
