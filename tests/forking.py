"""A process that has imported what others need, and forks for each of them.

A module calls `serve` when it is run, and is run by a `Server`. It must not use JAX before: a
process with JAX's threads cannot fork.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

Order = Mapping[str, Any]
"""What a child does, as JSON has it; under "log" the file of its output."""


class Server:
    """Runs `python -m MODULE`; a context manager."""

    def __init__(self, root: pathlib.Path, module: str, *words: str) -> None:
        self._root, self._command = root, [sys.executable, "-m", module, *words]

    def __enter__(self) -> Server:
        self._process = subprocess.Popen(
            self._command,
            cwd=self._root,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.communicate(timeout=60)

    def start(self, *orders: Order) -> list[int]:
        """Forks a child for each order, all at the same time; returns their exit codes."""
        print(json.dumps(orders), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def serve(run: Callable[[Order], int]) -> None:
    """Forks a child for each order on the standard input.

    Args:
      run: returns the child's exit code; 1 if it raises.
    """
    for line in sys.stdin:
        children = [_fork(run, order) for order in json.loads(line)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


def _fork(run: Callable[[Order], int], order: Order) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    with open(order["log"], "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        code = run(order)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
