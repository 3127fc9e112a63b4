"""Checksums of a checkpoint's files.

The array format has no checksum of its own data: a flipped bit would load as a wrong weight. So
each checkpoint carries a list of its files' sizes and CRC-32 sums, which is read before a restore.
"""

from __future__ import annotations

import json
import pathlib
import zlib
from collections.abc import Iterable

from perception_jax.files import write_whole

NAME = "files.json"

_CHUNK = 1 << 24


def seal(directory: pathlib.Path, parts: Iterable[str]) -> None:
    """Writes `NAME` into `directory`: size and CRC-32 of every file under its folders `parts`."""
    files = (path for part in parts for path in sorted((directory / part).rglob("*")))
    listed = {
        path.relative_to(directory).as_posix(): [path.stat().st_size, _checksum(path)]
        for path in files
        if path.is_file()
    }
    write_whole(directory / NAME, json.dumps(listed, indent=1) + "\n")


def find_damage(directory: pathlib.Path) -> str:
    """What is wrong with a sealed directory, in words; "" if nothing is."""
    try:
        listed = json.loads((directory / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{NAME} cannot be read ({error})"
    for name, (size, checksum) in listed.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found} bytes, {size} were written"
        if _checksum(path) != checksum:
            return f"{name} has another content than was written"
    return ""


def _checksum(path: pathlib.Path) -> int:
    total = 0
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            total = zlib.crc32(block, total)
    return total
