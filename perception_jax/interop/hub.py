"""Fetching a checkpoint's files from the Hugging Face hub, with the extra [hub]."""

from __future__ import annotations

import pathlib

from perception_jax.errors import CheckpointError

_SETTINGS = ("*.json", "*.txt", "*.model")
_WEIGHTS = (("*.safetensors",), ("*.bin",), ("*.pth", "*.pt"))
"""Later ones are fetched only where there are none of the earlier."""


def fetch(name: str) -> pathlib.Path:
    """The folder with the settings, tokenizer files and weights of `owner/name`.

    Formats that need the restricted reader are fetched only if there are no safetensors.

    Raises:
      CheckpointError: the extra is not installed, there is no such repository or no connection.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{name!r} is no local folder; to fetch it from the hub: "
            "pip install 'perception_jax[hub]'"
        ) from error
    try:
        for weights in _WEIGHTS:
            folder = pathlib.Path(snapshot_download(name, allow_patterns=[*_SETTINGS, *weights]))
            if any(any(folder.glob(pattern)) for pattern in weights):
                break
    except Exception as error:  # the hub's client raises many unrelated types
        raise CheckpointError(
            f"cannot fetch {name!r} from the hub: {error}. Check the name and the connection, or "
            "download the folder elsewhere and give its path."
        ) from error
    return folder
