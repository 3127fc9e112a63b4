"""Checksums of a checkpoint's files.

The array format has no checksum of its own data: a flipped bit would load as a wrong weight. So
each checkpoint carries a list of its files' sizes and CRC-32 sums, which is read before a restore.
"""

from __future__ import annotations

import errno
import json
import pathlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from perception_jax.errors import CheckpointError
from perception_jax.files import write_whole

NAME = "files.json"
"""File name of the checksums."""

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


def find_damage(directory: pathlib.Path, *, contents: bool = True) -> str:
    """Describes the damage of a sealed directory; "" if there is none.

    Without `contents`, files are only looked up and their sizes compared.

    Raises:
      CheckpointError: it cannot be checked: a file may not be read, or memory or
        file handles have run out. That says nothing about the files.
    """
    try:
        listed = json.loads((directory / NAME).read_text(encoding="utf-8"))
        return _malformed(listed) or _first_difference(directory, listed, contents)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"{error.filename or NAME} is missing or no file"
    except (ValueError, RecursionError) as error:
        return f"{NAME} cannot be read ({error})"
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno == errno.EIO:
            return f"the disk cannot read it ({error})"
        raise CheckpointError(
            f"checkpoint {directory} cannot be checked: {type(error).__name__}: {error}. Its files "
            "may be intact; repair this, then run the same command again."
        ) from error


def _malformed(listed: Any) -> str:
    """Whether this is not the list that `seal` writes, in words."""
    if not isinstance(listed, dict) or not listed:
        return f"{NAME} should list files, found {json.dumps(listed)[:60]}"
    for name, entry in listed.items():
        numbers = entry if isinstance(entry, list) else ()
        if len(numbers) != 2 or not all(type(number) is int for number in numbers):
            return f"{NAME}: {name} should have a size and a checksum, found {str(entry)[:60]}"
        if pathlib.PurePosixPath(name).is_absolute() or ".." in pathlib.PurePosixPath(name).parts:
            return f"{NAME}: {name} is outside the checkpoint"
    return ""


def _first_difference(
    directory: pathlib.Path, listed: Mapping[str, list[int]], contents: bool
) -> str:
    for name, (size, checksum) in listed.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found} bytes, {size} were written"
        if contents and _checksum(path) != checksum:
            return f"{name} has another content than was written"
    return ""


def _checksum(path: pathlib.Path) -> int:
    total = 0
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            total = zlib.crc32(block, total)
    return total
