"""A program of `test_readme`: runs scripts in forks, which need not import other packages again.

Modules of this project are imported by each script, from its folder.
"""

from __future__ import annotations

import os
import sys

import flax.nnx  # noqa: F401
import grain  # noqa: F401
import jax  # noqa: F401
import jaxtyping  # noqa: F401
import optax  # noqa: F401
import orbax.checkpoint  # noqa: F401
import PIL.Image  # noqa: F401

from tests.forking import Order, serve


def run(order: Order) -> int:
    """Runs `order["script"]` in `order["folder"]`, as `python -c` does."""
    os.chdir(order["folder"])
    sys.path[0] = ""
    exec(compile(order["script"], "<string>", "exec"), {"__name__": "__main__"})
    return 0


if __name__ == "__main__":
    serve(run)
