"""Many rows through a compiled function, in calls of one shape so that nothing recompiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from perception_jax.ops.sharding import gathered


def in_batches(
    call: Callable[[np.ndarray], Any], rows: Shaped[np.ndarray, "N ..."], size: int
) -> Any:
    """What `call` gives for all rows, as numpy arrays; the last row fills up the last call.

    Args:
      call: takes `size` rows, gives a pytree of arrays with as many rows, which may lie anywhere.
    """
    done = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        padding = np.repeat(part[-1:], size - len(part), axis=0)
        done.append(gathered(call(np.concatenate([part, padding]))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(rows)], *done)
