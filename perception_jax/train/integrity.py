"""Checksums of a checkpoint's files.

The array format has no checksum of its own data: a flipped bit would load as a wrong weight. So
each checkpoint has a list of its files' sizes and CRC-32 sums, which is compared before a restore.

Each process reads only the files that it wrote itself, which the names of folders and files tell
(`ocdbt.process_3/…`); all others belong to process 0. On another number of processes, process p of
n takes the files of the writers w with w % n == p. Files are summed in pieces by several threads.
"""

from __future__ import annotations

import concurrent.futures
import errno
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from perception_jax.errors import CheckpointError
from perception_jax.files import write_whole

NAME = "files.json"
"""File name of the checksums."""

Sums = dict[str, list[int]]
"""Per file, by its path in the folder: its size, then the CRC-32 of each piece of `PIECE` bytes.

Lists of older versions have one sum for a file of any size.
"""

PIECE = 1 << 26
"""Bytes of a file that one thread sums at a time."""

_CHUNK = 1 << 24
_THREADS = min(8, os.cpu_count() or 1)
_WRITER = re.compile(r"(?:^|/)(?:ocdbt\.)?process_(\d+)(?:[-/.]|$)")


def checksums(directory: pathlib.Path, share: tuple[int, int] = (0, 1), *, name: str = "") -> Sums:
    """Reads the files under `directory` that are one process's share.

    Args:
      share: index and number of the processes that divide the files.
      name: of the directory, as a prefix of the files' names.
    """
    names = sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and path.name != NAME
    )
    names = [file for file in names if _is_in(share, file)]
    sizes = [(directory / file).stat().st_size for file in names]
    jobs = [
        (directory / file, start, PIECE)
        for file, size in zip(names, sizes, strict=True)
        for start in range(0, max(size, 1), PIECE)
    ]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        sums = iter(list(pool.map(lambda job: _checksum(*job), jobs)))
    prefix = f"{name}/" if name else ""
    return {
        prefix + file: [size, *(next(sums) for _ in range(_pieces(size)))]
        for file, size in zip(names, sizes, strict=True)
    }


def write_list(directory: pathlib.Path, listed: Mapping[str, list[int]]) -> None:
    """Writes `NAME` into `directory`."""
    write_whole(directory / NAME, json.dumps(listed, indent=1) + "\n")


def find_damage(
    directory: pathlib.Path, *, contents: bool = True, share: tuple[int, int] = (0, 1)
) -> str:
    """Describes the damage of a directory with a list of its files; "" if there is none.

    Args:
      contents: whether to read the files; else they are only looked up and their sizes compared.
      share: index and number of the processes that divide the files.

    Raises:
      CheckpointError: it cannot be checked: a file may not be read, or memory or
        file handles have run out. That says nothing about the files.
    """
    try:
        listed = json.loads((directory / NAME).read_text(encoding="utf-8"))
        why = _malformed(listed)
        if why:
            return why
        own = {name: entry for name, entry in listed.items() if _is_in(share, name)}
        return _other_size(directory, own) or (_other_content(directory, own) if contents else "")
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


def _is_in(share: tuple[int, int], name: str) -> bool:
    """Whether this file is for process `index` of `count` to read."""
    index, count = share
    found = _WRITER.search(name)
    return (int(found[1]) if found else 0) % count == index


def _pieces(size: int) -> int:
    return max(1, -(-size // PIECE))


def _malformed(listed: Any) -> str:
    """Describes why this is not a list of files; "" if it is one."""
    if not isinstance(listed, dict) or not listed:
        return f"{NAME} should list files, found {json.dumps(listed)[:60]}"
    for name, entry in listed.items():
        numbers = entry if isinstance(entry, list) else ()
        if len(numbers) < 2 or not all(type(number) is int for number in numbers):
            return f"{NAME}: {name} should have a size and checksums, found {str(entry)[:60]}"
        if len(numbers) - 1 not in (1, _pieces(numbers[0])):
            return f"{NAME}: {name} has {len(numbers) - 1} checksums for {numbers[0]} bytes"
        if pathlib.PurePosixPath(name).is_absolute() or ".." in pathlib.PurePosixPath(name).parts:
            return f"{NAME}: {name} is outside the checkpoint"
    return ""


def _other_size(directory: pathlib.Path, listed: Mapping[str, list[int]]) -> str:
    for name, (size, *_) in listed.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found} bytes, {size} were written"
    return ""


def _other_content(directory: pathlib.Path, listed: Mapping[str, list[int]]) -> str:
    def jobs() -> Iterator[tuple[str, int, int, int]]:
        for name, (size, *sums) in listed.items():
            length = PIECE if len(sums) == _pieces(size) else size
            for number, expected in enumerate(sums):
                yield name, number * PIECE, length, expected

    def differs(job: tuple[str, int, int, int]) -> bool:
        name, start, length, expected = job
        return _checksum(directory / name, start, length) != expected

    every = list(jobs())
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for job, differing in zip(every, pool.map(differs, every), strict=True):
            if differing:
                return f"{job[0]} has another content than was written"
    return ""


def _checksum(path: pathlib.Path, start: int, length: int) -> int:
    total, left = 0, length
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(min(_CHUNK, left)):
            total, left = zlib.crc32(block, total), left - len(block)
    return total
