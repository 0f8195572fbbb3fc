"""Names of checkpoints: from a name to its files, and from files to the names a registry may know."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

from expert_registry.errors import UnsupportedModelError
from expert_registry.files import is_folder
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.models import lab_checkpoint
from vllm_steermoe_plugin.models.architectures import shape_of

_CHECKPOINT_SUFFIXES = frozenset(
    {".bin", ".gguf", ".jinja", ".json", ".model", ".pt", ".pth", ".py", ".safetensors", ".txt"}
)
_SAMPLES, _SAMPLE = 256, 4096
"""Of a file, at most about so many samples of so many bytes."""
_HUB_CACHE = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")


def resolve_checkpoint(name: str) -> str:
    """What to give vLLM for a model name: the shipped folder for `steermoe-lab`, else the name itself."""
    return str(lab_checkpoint.MODEL_DIR) if name == lab_checkpoint.NAME else name


def revision_of(model: str) -> str:
    """What identifies the weights of a model given by name or folder, where we know: the sha256 of steermoe-lab's."""
    if not _is_lab(model):
        return ""
    return "sha256:" + hashlib.sha256((lab_checkpoint.MODEL_DIR / "model.safetensors").read_bytes()).hexdigest()


def fingerprint_of(folder: Path) -> str:
    """sha256 of what a checkpoint folder holds; empty if it is no folder.

    Of large files it takes samples: weights that were trained further differ nearly everywhere, and reading all of
    them takes longer than what it would protect.
    """
    if not is_folder(folder):
        return ""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in _CHECKPOINT_SUFFIXES or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode("utf-8", "surrogatepass"))
        with path.open("rb") as file:
            for start in range(0, size, max(_SAMPLE, size // _SAMPLES)):
                file.seek(start)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def names_of(model: str, aliases: Iterable[str] = ()) -> list[str]:
    """The names under which a registry may know a served model, the most telling first.

    Args:
        model: what vLLM was given, a hub id or a folder.
        aliases: served model names.
    """
    path = Path(model)
    names = [lab_checkpoint.NAME] if _is_lab(model) else []
    cached = _HUB_CACHE.search(path.as_posix() + "/")
    if cached:
        names.append(f"{cached[1]}/{cached[2]}")
    # A folder without a config.json that we can read (another format) is served all the same.
    original = _config(path).get("_name_or_path") if _has_config(path) else None
    # Tools write there what they loaded, so a fine-tune names its base. Only a folder that still bears the
    # model's own name is taken for a copy; a fine-tune's rankings are the operator's choice (`base_model`).
    if isinstance(original, str) and original.rpartition("/")[2].lower() == path.name.lower():
        names.append(original)
    names += [model, *aliases]
    return list(dict.fromkeys(names))


def _is_lab(model: str) -> bool:
    path = Path(model)
    return (
        model == lab_checkpoint.NAME
        or path == lab_checkpoint.MODEL_DIR
        or (is_folder(path) and is_folder(lab_checkpoint.MODEL_DIR) and path.samefile(lab_checkpoint.MODEL_DIR))
    )


def shape_in(folder: Path) -> MoEShape:
    """The MoE shape of a checkpoint folder, from its config.json.

    Raises:
        UnsupportedModelError: no readable config, or a model that cannot be steered.
    """
    return shape_of(SimpleNamespace(**_config(folder)))


def _has_config(folder: Path) -> bool:
    try:
        _config(folder)
    except UnsupportedModelError:
        return False
    return True


def _config(folder: Path) -> dict[str, object]:
    path = folder / "config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise UnsupportedModelError(f"{path} is not a JSON object")
    return value
