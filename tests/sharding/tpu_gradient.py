"""A program: compiles the gradient of CLIP's ViT-L/14-336 for a TPU slice that is not there.

python -m tests.sharding.tpu_gradient [POLICY [REPLICA FSDP TENSOR]]; needs libtpu, prints one line
of JSON. POLICY is a name of `nn.stack.REMAT`.
"""

from __future__ import annotations

import json
import os
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies

from perception_jax.models.clip.config import ClipConfig
from perception_jax.models.clip.modeling import ClipVisionTower
from perception_jax.models.params import flatten, unflatten
from perception_jax.models.shardings import SHARDINGS
from perception_jax.shard import mesh as mesh_lib
from perception_jax.shard import program
from perception_jax.shard.rules import shardings

BATCH, SIDE = 256, 336


def main(remat: str = "full", *sizes: str) -> None:
    slice_ = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    mesh = mesh_lib.make_mesh(*map(int, sizes or (1, 16, 1)), devices=slice_.devices)
    config = ClipConfig.vit_l14_336()
    tower = nnx.eval_shape(
        lambda: ClipVisionTower(config.vision, config.embed_dim, rngs=nnx.Rngs(params=0))
    )
    leaves = flatten(tower)
    placed = shardings(leaves, SHARDINGS, mesh)

    def loss(leaves: dict[str, jax.Array], pixels: jax.Array) -> jax.Array:
        half = {path: leaf.astype(jnp.bfloat16) for path, leaf in leaves.items()}
        out = unflatten(tower, half)(pixels.astype(jnp.bfloat16), remat=remat)
        return jnp.sum(out.embedding.astype(jnp.float32) ** 2)

    pixels = jax.ShapeDtypeStruct((BATCH, SIDE, SIDE, 3), jnp.float32)
    with jax.set_mesh(mesh):
        gradient = jax.jit(
            jax.grad(loss),
            in_shardings=(placed, mesh_lib.batch_sharding(mesh)),
            out_shardings=placed,
        )
        compiled = gradient.lower(leaves, pixels).compile()
    memory = compiled.memory_analysis()
    found = set(program.results(compiled))
    print(
        json.dumps(
            {
                "temporary_bytes": memory.temp_size_in_bytes,
                "host_bytes": memory.host_temp_size_in_bytes,
                "argument_bytes": memory.argument_size_in_bytes,
                "collectives": len([r for r in found if r.is_collective]),
                "whole_batch": [str(r) for r in found if len(r.shape) >= 3 and BATCH in r.shape],
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
