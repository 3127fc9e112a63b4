"""A program: compiles the search for blind pairs among a million images for a TPU slice.

python -m tests.sharding.tpu_mining; needs libtpu, prints one line of JSON.
"""

from __future__ import annotations

import json
import math
import os

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

from jax.experimental import topologies

from perception_jax.shard import mesh as mesh_lib
from perception_jax.shard import program
from perception_jax.systems.mmvp.mining import COLUMNS, lowered


def main() -> None:
    slice_ = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    mesh = mesh_lib.make_mesh(1, 16, 1, devices=slice_.devices)
    compiled = lowered(1_000_000, 768, mesh=mesh).compile()
    found, memory = list(program.results(compiled)), compiled.memory_analysis()
    columns = math.ceil(1_000_000 / math.ceil(1_000_000 / COLUMNS))
    products = [r for r in found if r.dtype == "f32" and columns in r.shape and 768 not in r.shape]
    print(
        json.dumps(
            {
                "arguments": memory.argument_size_in_bytes,
                "temporary": memory.temp_size_in_bytes,
                "outputs": memory.output_size_in_bytes,
                "collectives": sorted({r.dtype for r in found if r.is_collective}),
                "largest_product": max(math.prod(r.shape) for r in products),
            }
        )
    )


if __name__ == "__main__":
    main()
