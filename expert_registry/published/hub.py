"""A data-set repository of the Hugging Face hub as a registry folder. `huggingface_hub` is imported when used.

The repository holds `MODEL/BEHAVIOUR/vN.safetensors` at its root, as any registry folder does; a clone of it is
one. From here, single rankings are fetched, checked and stored like files of unknown origin.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from expert_registry.behaviours import canonical
from expert_registry.errors import UnknownRankingError, one_of
from expert_registry.format import MAX_BYTES, SUFFIX, parse_ranking, read_bytes
from expert_registry.places import is_key, model_key
from expert_registry.published.download import DownloadError
from expert_registry.sharing import Stored, store

_FILE = re.compile(r"([a-z0-9][a-z0-9._-]*)/([a-z][a-z0-9_-]{0,63})/v([1-9][0-9]{0,5})" + re.escape(SUFFIX))
MAX_FILES = 100_000


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A data-set repository at a revision (branch, tag or commit)."""

    id: str
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> HubRepository:
        """`org/name` or `org/name@revision`."""
        name, _, revision = text.partition("@")
        return cls(name, revision or "main")

    def pull(self, model: str, behaviour: str | None, folder: Path) -> list[Stored]:
        """Fetch the rankings of a model (all versions; of one behaviour or of all) and store them.

        Raises:
            UnknownRankingError: the repository has none; the message names what it has.
            DownloadError: the hub cannot be reached, knows no such repository, or sends too much.
            RankingFormatError: a file is no ranking, is in the wrong place, or another is stored under its version.
        """
        try:
            from huggingface_hub import HfApi
            from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
        except ImportError:
            raise DownloadError("pulling from the hub needs `pip install 'vllm-steermoe-plugin[hub]'`") from None
        import httpx

        api = HfApi()
        result = []
        try:
            # Pinned to one commit, so that the listing and the files belong together.
            commit = api.repo_info(self.id, repo_type="dataset", revision=self.revision).sha
            sizes = self._sizes(api.list_repo_tree(self.id, recursive=True, repo_type="dataset", revision=commit))
            for path in self._matching(list(sizes), model, behaviour):
                if sizes[path] > MAX_BYTES:
                    raise DownloadError(f"{self.id}/{path} has {sizes[path]} bytes; a ranking has at most {MAX_BYTES}")
                with tempfile.TemporaryDirectory() as scratch:
                    file = api.hf_hub_download(self.id, path, repo_type="dataset", revision=commit, local_dir=scratch)
                    result.append(self._store(read_bytes(Path(file)), path, folder))
        except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
            raise DownloadError(f"cannot read the data-set repository {self.id}: {str(error)[:300]}") from None
        return result

    @staticmethod
    def _sizes(tree: object) -> dict[str, int]:
        from huggingface_hub.hf_api import RepoFile

        sizes: dict[str, int] = {}
        for item in tree:  # type: ignore[attr-defined]
            if isinstance(item, RepoFile) and _FILE.fullmatch(item.path):
                sizes[item.path] = item.size
            if len(sizes) > MAX_FILES:
                raise DownloadError(f"the repository lists more than {MAX_FILES} rankings")
        return sizes

    def _matching(self, paths: list[str], model: str, behaviour: str | None) -> list[str]:
        key = model_key(model)
        there = [(match, path) for path in sorted(paths) if (match := _FILE.fullmatch(path))]
        of_model = [(match, path) for match, path in there if is_key(key) and match[1] == key]
        if not of_model:
            raise UnknownRankingError(f"{self.id}: {one_of(model, {match[1] for match, _ in there}, 'model')}")
        known = {match[2] for match, _ in of_model}
        if behaviour is not None and canonical(behaviour, known) not in known:
            raise UnknownRankingError(f"{self.id}: {one_of(behaviour, known, 'behaviour')}")
        return [path for match, path in of_model if behaviour is None or match[2] == canonical(behaviour, known)]

    def _store(self, data: bytes, path: str, folder: Path) -> Stored:
        card = parse_ranking(data, f"{self.id}/{path}").card
        if path != f"{model_key(card.model.id)}/{card.behaviour}/v{card.version}{SUFFIX}":
            raise DownloadError(
                f"{self.id}/{path} says of itself that it is {card.model.id} {card.behaviour}@{card.version}"
            )
        return store(data, folder, f"{self.id}/{path}")
