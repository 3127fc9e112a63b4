"""Runs a call on hostile files in a process with little memory and time, and tells how it ended."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]

_CHILD = """
import importlib, json, resource, signal, sys, time
from perception_jax.errors import PerceptionError

module, name, seconds, megabytes, *paths = sys.argv[1:]
call = getattr(importlib.import_module(module), name)


class Late(BaseException):
    pass


def late(*_):
    raise Late


signal.signal(signal.SIGPROF, late)
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = pages + int(megabytes) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in paths:
    start, kind, message = time.process_time(), "", ""
    signal.setitimer(signal.ITIMER_PROF, float(seconds))
    try:
        call(path)
    except BaseException as error:
        kind, message = type(error).__name__, str(error)[:2000]
        if isinstance(error, PerceptionError):
            kind = "PerceptionError"
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps([kind, message, time.process_time() - start]), flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Attributes:
    kind: of what was raised: "PerceptionError" for all of ours, "" for nothing, "Late" where the
      time was up, "killed" where the process died or hung.
    message: its text.
    seconds: of the processor that it took.
    """

    kind: str
    message: str
    seconds: float


def outcomes(
    module: str,
    function: str,
    paths: Sequence[pathlib.Path],
    *,
    seconds: int = 5,
    megabytes: int = 512,
) -> list[Outcome]:
    """What `function(path)` does for each path; one process for all, so that it starts once.

    Args:
      seconds: of the processor for each path, so that a busy machine changes nothing.
      megabytes: of address space beyond what the imports take.
    """
    command = [sys.executable, "-c", _CHILD, module, function, str(seconds), str(megabytes)]
    try:
        result = subprocess.run(
            [*command, *map(str, paths)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60 + 5 * seconds * len(paths),
        )
        lines, end = result.stdout.splitlines(), result.stderr[-2000:]
    except subprocess.TimeoutExpired as error:
        lines, end = (error.stdout or b"").decode().splitlines(), "no end"
    found = [Outcome(*json.loads(line)) for line in lines]
    return found + [Outcome("killed", end, 0.0)] * (len(paths) - len(found))
