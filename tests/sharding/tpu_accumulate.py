"""A program: compiles an accumulated training step for a TPU slice that is not there.

python -m tests.sharding.tpu_accumulate TASK; needs libtpu, prints one line of JSON about sums over
the copies of the model. TASK is a class of `tests.sharding.test_accumulate`.
"""

from __future__ import annotations

import json
import sys

from perception_jax.shard import slices
from tests.sharding import test_accumulate
from tests.sharding.test_accumulate import Compiled


def main(name: str) -> None:
    devices = slices.devices(slices.find("v5e-16"))
    found = Compiled.of(
        getattr(test_accumulate, name), {"replica": 8, "fsdp": 2}, devices, accumulate=4, rows=64
    )
    sizes = {
        "gradient": found.gradient_numbers(),
        "summed_after_the_loop": found.summed(once=True),
        "summed_in_the_loop": found.summed(once=False),
    }
    print(json.dumps(sizes))


if __name__ == "__main__":
    main(*sys.argv[1:])
