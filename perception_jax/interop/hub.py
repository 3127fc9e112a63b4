"""Downloads a checkpoint's files from the Hugging Face hub (extra [hub]).

Of several processes the first downloads alone. The others wait, and then find its files in a cache
that they share with it, or else download the same revision: once for each host.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from perception_jax.errors import CheckpointError
from perception_jax.interop.checkpoint_dir import INDEX_SUFFIX, WEIGHT_SUFFIXES, is_inner_path
from perception_jax.shard import distributed

_SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja")
_WEIGHTS = (("*.safetensors",), ("*.bin",), ("*.pth", "*.pt"))
"""Later ones are fetched only where there are none of the earlier."""

_TIMEOUT_SECONDS = 6 * 3600.0
"""How long a process waits for the download of the first."""


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `owner/name` or `owner/name:path/in/the/repository`."""
    repository, colon, inside = name.partition(":")
    parts = repository.split("/")
    plain = len(parts) == 2 and all(parts) and not repository.startswith(".")
    return plain and (bool(inside) if colon else not repository.endswith(WEIGHT_SUFFIXES))


def fetch(name: str) -> pathlib.Path:
    """Downloads a hub id and returns the local path.

    Args:
      name: `owner/name` for the whole checkpoint; `owner/name:towers/image` for a folder of the
        repository, `owner/name:model.pth` for one file of weights and the settings next to it.

    Returns:
      The folder, or the file.

    Raises:
      CheckpointError: the extra is not installed, there is no such repository or no connection, or
        nothing in it is called so.
    """
    repository, _, inside = name.partition(":")
    if inside and not is_inner_path(inside):
        raise CheckpointError(
            f"{name!r}: expected the path of a file or folder in the repository {repository} "
            f"behind the colon, such as model.pth or towers/image; found {inside!r}."
        )
    if not inside:
        return _first_weights(name, repository, "")
    below = "".join(f"{_escaped(part)}/" for part in inside.split("/")[:-1])
    if inside.endswith(INDEX_SUFFIX):
        return _existing(name, _first_weights(name, repository, below), inside)
    if not inside.endswith(WEIGHT_SUFFIXES):
        return _existing(name, _first_weights(name, repository, f"{_escaped(inside)}/"), inside)
    patterns = [_escaped(inside), *(below + pattern for pattern in _SETTINGS)]
    return _existing(name, _download(name, repository, patterns), inside)


def fetch_settings(name: str) -> pathlib.Path:
    """Downloads the files of a hub id `owner/name` without its weights; returns the local folder.

    Raises:
      CheckpointError: as `fetch`.
    """
    return _download(name, name, _SETTINGS)


def _first_weights(name: str, repository: str, below: str) -> pathlib.Path:
    """Settings and weights below a folder; formats that need the restricted reader are fetched only
    if there are no safetensors."""
    for weights in _WEIGHTS:
        patterns = [below + pattern for pattern in (*_SETTINGS, *weights)]
        folder = _download(name, repository, patterns)
        if any(any(folder.glob(below + pattern)) for pattern in weights):
            break
    return folder


def _existing(name: str, folder: pathlib.Path, inside: str) -> pathlib.Path:
    path = folder / inside
    if not path.exists():
        raise CheckpointError(
            f"{name!r}: expected {inside} in the repository, found nothing of that name. Its files "
            "are listed on its page on the hub."
        )
    return path


def _download(name: str, repository: str, patterns: Sequence[str]) -> pathlib.Path:
    folders: list[pathlib.Path] = []

    def first() -> str:
        folders.append(_snapshot(name, repository, patterns))
        return folders[0].name  # the commit, so that all processes have the same revision

    revision = distributed.from_first(
        f"download of {repository} {' '.join(patterns)}", first, timeout_seconds=_TIMEOUT_SECONDS
    )
    return folders[0] if folders else _snapshot(name, repository, patterns, revision)


def _snapshot(
    name: str, repository: str, patterns: Sequence[str], revision: str | None = None
) -> pathlib.Path:
    """The folder of a revision (the newest by default), with the files that fit the patterns."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{name!r} is no local folder; to fetch it from the hub: "
            "pip install 'perception_jax[hub]'"
        ) from error
    try:
        return pathlib.Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(patterns))
        )
    except Exception as error:  # the hub's client raises many unrelated types
        raise CheckpointError(
            f"cannot fetch {name!r} from the hub: {error}. Check the name and the connection, or "
            "download the folder elsewhere and give its path."
        ) from error


def _escaped(name: str) -> str:
    """A name as a pattern that fits nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
