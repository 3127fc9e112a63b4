"""The results of an evaluation as a file and on the terminal, in the same form for all systems."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from perception_jax.errors import PerceptionError
from perception_jax.files import write_whole

RESULTS_FILE = "results.json"
"""Name of the file with the results, in a workdir or in the folder of `launch.evaluate`."""


def write_results(
    folder: pathlib.Path, numbers: Mapping[str, float], *, details: Mapping[str, Any] | None = None
) -> pathlib.Path:
    """Writes `results.json`, whole or not at all, and prints the main numbers.

    Args:
      folder: exists.
      numbers: the main numbers by flat name.
      details: further entries of the file that are not printed, e.g. all scores of all protocols.

    Raises:
      PerceptionError: the file cannot be written.
    """
    path = folder / RESULTS_FILE
    text = json.dumps({**numbers, **(details or {})}, indent=2)
    try:
        write_whole(path, text + "\n")
    except OSError as error:
        raise PerceptionError(
            f"expected to write the results to {path}, found {error}; check the folder and the "
            "free space, then run launch.evaluate again."
        ) from error
    width = max(map(len, numbers), default=0)
    for name, value in numbers.items():
        print(f"  {name:{width}s} {value:.4g}")
    print(f"results     {path}")
    return path
