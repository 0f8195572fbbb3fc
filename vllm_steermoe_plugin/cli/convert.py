"""`steermoe convert`: steering files of other tools as profiles, and profiles as EasySteer's file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from expert_registry import MoEShape, Registry
from expert_registry.errors import UsageError, one_of
from expert_registry.files import read_bounded, write_atomic
from vllm_steermoe_plugin.cli.inputs import read_profile, read_text
from vllm_steermoe_plugin.cli.registry.opening import shape_of_model
from vllm_steermoe_plugin.models.checkpoints import names_of
from vllm_steermoe_plugin.steering.interchange import ds4_signs
from vllm_steermoe_plugin.steering.interchange.easysteer import read_easysteer
from vllm_steermoe_plugin.steering.interchange.easysteer_writing import write_easysteer
from vllm_steermoe_plugin.steering.interchange.layer_ranges import parse_layers
from vllm_steermoe_plugin.steering.interchange.matrix import profile_of_matrix
from vllm_steermoe_plugin.steering.interchange.tensor_files import read_matrix
from vllm_steermoe_plugin.steering.profile import MAX_TEXT, SteeringProfile
from vllm_steermoe_plugin.steering.request import parse_request
from vllm_steermoe_plugin.steering.resolve import resolve
from vllm_steermoe_plugin.steering.rules import check_rules

_SOURCES = ("ds4-signs", "easysteer", "matrix", "profile", "request")
_TARGETS = ("easysteer", "profile")
_NOTE = (
    "note: of activated and deactivated experts, EasySteer rewrites the log-softmax of the logits and this package "
    "the logits; on a router that is not softmax the two are not the same (docs/interchange.md)"
)


def convert(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="File; with --from request a steering expression.")],
    from_: Annotated[
        str,
        typer.Option(
            "--from",
            help="easysteer: its layer_configs. matrix: a row of biases for each MoE layer (.npy, .safetensors). "
            "ds4-signs: the 43 x 256 float32 of antirez/ds4 of which the sign steers; a map of the same bytes that is "
            "added to scores is none, and only --model checks that no layer activates more than the top-k. "
            "profile: our JSON. request: such as digits:strength=0.5:by=sign:top=20, with --model.",
        ),
    ],
    to: Annotated[str, typer.Option(help="profile, or easysteer.")] = "profile",
    out: Annotated[Path | None, typer.Option(help="File to write; default: standard output.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    model: Annotated[str | None, typer.Option(help="Hub id, folder, or steermoe-lab, to check against.")] = None,
    experts: Annotated[
        int | None, typer.Option(min=2, max=65_536, help="Routed experts of a layer, where --model does not say it.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="matrix: the checkpoint's layer index of each row, such as 1-27 or 0,2,4-9.")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="matrix: multiplies it; default 1.")] = None,
    threshold: Annotated[float | None, typer.Option(help="matrix: what is no larger counts as 0; default 0.")] = None,
) -> None:
    """Convert steering between this package's profiles and the files of other tools; what is not exact is refused."""
    for given, known, what in ((from_, _SOURCES, "format to convert from"), (to, _TARGETS, "format to convert to")):
        if given not in known:
            raise UsageError(one_of(given, known, what))
    into = _Into.of(model, experts)
    profile, columns = _read(source, from_, into, _Rows(layers, strength, threshold))
    number = _agree(into.experts, columns, "the input")
    if not profile:
        raise UsageError(f"{source:.80}: all its biases are 0 in half precision, so it would steer nothing")
    if into.shape is not None:
        check_rules(profile, into.shape)
    if "easysteer" in (from_, to) and (profile.activate or profile.deactivate):
        typer.echo(_NOTE, err=True)
    text = write_easysteer(profile, _known(number)) if to == "easysteer" else _as_json(profile)
    if out is None:
        typer.echo(text)
        return
    try:
        write_atomic(out, f"{text}\n".encode(), overwrite=overwrite)
    except FileExistsError:
        raise UsageError(f"{out} exists; name another file or say --overwrite") from None


@dataclass(frozen=True, slots=True)
class _Into:
    """The model that is to be steered, as far as the command line says which."""

    model: str | None
    shape: MoEShape | None
    experts: int | None
    registry: Registry

    @classmethod
    def of(cls, model: str | None, experts: int | None) -> _Into:
        registry = Registry.default()
        shape = None if model is None else shape_of_model(model, registry)
        return cls(model, shape, _agree(experts, None if shape is None else shape.num_experts, "the model"), registry)


class _Rows(NamedTuple):
    """The options about a matrix."""

    layers: str | None
    strength: float | None
    threshold: float | None


def _read(source: str, kind: str, into: _Into, rows: _Rows) -> tuple[SteeringProfile, int | None]:
    """The profile of an input, and how many experts a layer has by what the input says."""
    if kind != "matrix" and any(option is not None for option in rows):
        raise UsageError(f"--layers, --strength and --threshold are about a matrix, and this is from {kind}")
    if kind == "request":
        return _requested(source, into), None
    path = Path(source)
    if kind == "profile":
        return read_profile(path), None
    if kind == "easysteer":
        return read_easysteer(read_text(path, MAX_TEXT), _known(into.experts)), None
    if kind == "ds4-signs":
        return ds4_signs.profile_of_signs(read_bounded(path, ds4_signs.SIZE)), ds4_signs.EXPERTS
    matrix = read_matrix(path)
    if rows.layers is not None:
        layers = parse_layers(rows.layers)
    elif into.shape is not None:
        layers = into.shape.layers
    else:
        raise UsageError("a matrix does not say which layers its rows are; say --layers or --model")
    strength = 1.0 if rows.strength is None else rows.strength
    profile = profile_of_matrix(matrix, layers, strength=strength, threshold=rows.threshold or 0.0)
    return profile, matrix.shape[1]


def _requested(text: str, into: _Into) -> SteeringProfile:
    request = parse_request(text)
    if into.model is None or into.shape is None or request.profiles:
        raise UsageError("a request is converted with --model, and without the @NAMEs that only a server knows")
    resolved = resolve(request, names_of(into.model), into.shape, into.registry)
    if resolved is None:
        raise UsageError(f"the request {text!r:.80} steers nothing")
    return resolved.profile


def _as_json(profile: SteeringProfile) -> str:
    text = profile.to_json()
    if len(text) > MAX_TEXT:
        raise UsageError(f"the profile would have {len(text)} characters, of which at most {MAX_TEXT} are read")
    return text


def _agree(number: int | None, found: int | None, what: str) -> int | None:
    if number is not None and found is not None and number != found:
        raise UsageError(f"{what} has {found} experts in a layer, not {number}")
    return number if found is None else found


def _known(number: int | None) -> int:
    if number is None:
        raise UsageError("EasySteer's file does not say how many experts a layer has; say --experts or --model")
    return number
