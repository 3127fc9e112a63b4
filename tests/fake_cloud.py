"""A make-believe Cloud TPU with one host: `gcloud`, `sudo`, `docker` and `sleep` as programs.

They keep what happens in `cloud.json` of the folder $FAKE_CLOUD, which a test fills with what is
to happen:

- states: of the queued resource, one for each look at it; the last one stays. "NONE" for none,
  "ERROR" for a look that fails.
- codes: exit code of each container that is started.
- looks: how often the first look at a container finds it running.
- ssh: for each connection, the exit code of one that breaks, or null for one that holds; all
  others hold.
- removed: whether a container is removed as soon as it has ended.

`calls` lists the words of each call of gcloud, `started` those of each container.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

PROGRAMS = {
    "gcloud": f'exec "{sys.executable}" -S "{__file__}" gcloud "$@"',
    "docker": f'exec "{sys.executable}" -S "{__file__}" docker "$@"',
    "sudo": 'exec "$@"',
    "sleep": "exit 0",
}


def install(folder: pathlib.Path, **happens: Any) -> dict[str, str]:
    """Puts the programs into a folder; returns the environment that finds them first."""
    for name, code in PROGRAMS.items():
        program = folder / name
        program.write_text(f"#!/bin/sh\n{code}\n")
        program.chmod(0o755)
    cloud = {"states": ["ACTIVE"], "codes": [0], "looks": 0, "ssh": [], "removed": False}
    _write(folder, {**cloud, **happens, "calls": [], "started": [], "container": None})
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "FAKE_CLOUD": str(folder)}


def read(folder: pathlib.Path) -> dict[str, Any]:
    """What has happened."""
    return json.loads((folder / "cloud.json").read_text())


def _write(folder: pathlib.Path, cloud: dict[str, Any]) -> None:
    (folder / "cloud.json").write_text(json.dumps(cloud))


def _gcloud(cloud: dict[str, Any], words: list[str], folder: pathlib.Path) -> int:
    cloud["calls"].append(words)
    verb = words[3]
    if verb == "ssh":
        breaks = cloud["ssh"].pop(0) if cloud["ssh"] else None
        _write(folder, cloud)
        if breaks is not None:
            return breaks
        (script,) = (word[10:] for word in words if word.startswith("--command="))
        return subprocess.run(["bash", "-c", script], check=False).returncode
    if verb == "describe":
        state = cloud["states"].pop(0) if len(cloud["states"]) > 1 else cloud["states"][0]
        if state in ("NONE", "ERROR"):
            reason = "NOT_FOUND: not found" if state == "NONE" else "INTERNAL: try later"
            print(f"ERROR: (gcloud) {reason}", file=sys.stderr)
        else:
            print(state)
        _write(folder, cloud)
        return int(state in ("NONE", "ERROR"))
    _write(folder, cloud)
    return 0


def _docker(cloud: dict[str, Any], words: list[str], folder: pathlib.Path) -> int:
    container, verb = cloud["container"], words[0]
    if verb == "run":
        (image,) = (k for k, word in enumerate(words) if word.startswith("registry/"))
        cloud["started"].append(words[image + 1 :])
        codes = cloud["codes"]
        cloud["container"] = codes.pop(0) if len(codes) > 1 else codes[0]
        print("0123456789abcdef")
    elif container is None:
        print("Error: No such container", file=sys.stderr)
        return 1
    elif verb == "logs":
        print("step 1")
    elif verb == "wait":
        print(container)
        cloud["container"] = None if cloud["removed"] else container
    elif verb == "inspect" and any("Running" in word for word in words):
        print("true" if cloud["looks"] > 0 else "false")
        cloud["looks"] = max(0, cloud["looks"] - 1)
    elif verb == "inspect":
        print(container)
    elif verb == "rm":
        cloud["container"] = None
    _write(folder, cloud)
    return 0


def main(name: str, words: list[str]) -> int:
    folder = pathlib.Path(os.environ["FAKE_CLOUD"])
    if name == "docker":
        return _docker(read(folder), words, folder)
    if words[0] == "compute":
        return _gcloud(read(folder), words, folder)
    return 0  # gcloud auth configure-docker, on the host


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
