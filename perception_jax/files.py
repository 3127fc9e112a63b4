"""Atomic file writes: a file is either complete or unchanged."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Yields a file that replaces `path` once the block has ended and all is on disk.

    Until then, and for ever if the block raises, an older file of that name stays as it was.

    Raises:
      OSError: the folder is missing, or the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: pathlib.Path, content: bytes | str) -> None:
    """Writes a file atomically; text becomes UTF-8. Raises as `replacing`."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
