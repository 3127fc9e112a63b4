"""One of two processes that fetch a repository of a make-believe hub, as `interop.hub` does.

`python -m tests.fake_hub PORT INDEX REMOTE CACHE NAME`. The hub is the folder REMOTE. Its client
appends a line to REMOTE/log for each file that it downloads, and whoever asks for the newest
revision gets another one each time. Prints the folder that was fetched.
"""

from __future__ import annotations

import pathlib
import shutil
import sys
import time
import types
from collections.abc import Sequence

import jax

from perception_jax.interop import hub

ID = "owner/name"
"""The only repository."""


def client(index: int, remote: pathlib.Path, cache: pathlib.Path) -> types.ModuleType:
    """The module `huggingface_hub` of a process."""

    def snapshot_download(repository: str, revision: str | None, allow_patterns: Sequence[str]):
        if repository != ID:
            raise OSError(f"404 for {repository}")
        if revision is None:
            asked = len(list(remote.glob("asked-*")))
            (remote / f"asked-{asked}").touch()
            revision = f"revision-{asked}"
        folder = cache / "snapshots" / revision
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in allow_patterns:
            for file in sorted((remote / "files").glob(pattern)):
                if not (folder / file.name).exists():
                    time.sleep(0.3)  # long enough for the other to begin too, if it did
                    with (remote / "log").open("a") as log:
                        log.write(f"{index} {file.name}\n")
                    shutil.copy(file, folder / file.name)
        return str(folder)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    return module


def main(port: str, index: str, remote: str, cache: str, name: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    sys.modules["huggingface_hub"] = client(int(index), pathlib.Path(remote), pathlib.Path(cache))
    print(hub.fetch(name), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
