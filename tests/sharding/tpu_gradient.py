"""A program: compiles the gradient of a model for a TPU slice that is not there.

python -m tests.sharding.tpu_gradient [vit|decoder] [--mesh=REPLICA,FSDP,TENSOR] [--dense]
    [--remat=POLICY]

Needs libtpu, prints one line of JSON. `vit` is CLIP's ViT-L/14-336, `decoder` two layers of Vicuna
7B over 2,623 tokens. POLICY is a name of `nn.stack.REMAT`. `--dense` has XLA compute the attention
as on other platforms.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies

from perception_jax.models.clip.config import ClipConfig
from perception_jax.models.clip.modeling import ClipVisionTower
from perception_jax.models.llama.config import LlamaConfig
from perception_jax.models.llama.modeling import Llama
from perception_jax.models.params import flatten, unflatten
from perception_jax.models.shardings import SHARDINGS
from perception_jax.nn.attention import splash
from perception_jax.shard import mesh as mesh_lib
from perception_jax.shard import program, traffic
from perception_jax.shard.rules import shardings

BATCHES = {"vit": 256, "decoder": 48}
"""No other axis of the model is as long."""
TOKENS = 2623


def vit(remat: str) -> tuple[nnx.Module, Callable, jax.ShapeDtypeStruct]:
    """The tower, its output of a batch, and the batch."""
    config = ClipConfig.vit_l14_336()

    def run(tower: ClipVisionTower, pixels: jax.Array) -> jax.Array:
        return tower(pixels.astype(jnp.bfloat16), remat=remat).embedding

    tower = nnx.eval_shape(
        lambda: ClipVisionTower(config.vision, config.embed_dim, rngs=nnx.Rngs(params=0))
    )
    side = config.vision.image_size
    return tower, run, jax.ShapeDtypeStruct((BATCHES["vit"], side, side, 3), jnp.float32)


def decoder(remat: str) -> tuple[nnx.Module, Callable, jax.ShapeDtypeStruct]:
    """The decoder without logits, its output of a batch, and the batch."""
    config = dataclasses.replace(LlamaConfig.vicuna_7b(), depth=2)

    def run(model: Llama, ids: jax.Array) -> jax.Array:
        return model(ids, head=False, remat=remat).tokens

    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(params=0)))
    return model, run, jax.ShapeDtypeStruct((BATCHES["decoder"], TOKENS), jnp.int32)


def main(model: str, sizes: tuple[int, int, int], remat: str, dense: bool) -> None:
    if dense:
        splash.takes = lambda *_: False
    slice_ = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    mesh = mesh_lib.make_mesh(*sizes, devices=slice_.devices)
    module, run, batch = {"vit": vit, "decoder": decoder}[model](remat)
    leaves = flatten(module)
    placed = shardings(leaves, SHARDINGS, mesh)

    def loss(leaves: dict[str, jax.Array], batch: jax.Array) -> jax.Array:
        half = {path: leaf.astype(jnp.bfloat16) for path, leaf in leaves.items()}
        return jnp.sum(run(unflatten(module, half), batch).astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        gradient = jax.jit(
            jax.grad(loss),
            in_shardings=(placed, mesh_lib.batch_sharding(mesh)),
            out_shardings=placed,
        )
        lowered = gradient.lower(leaves, batch)
        start = time.perf_counter()
        compiled = lowered.compile()
    memory = compiled.memory_analysis()
    found = set(program.results(compiled))
    sent = traffic.by_kind(traffic.traffic(compiled, mesh.size))
    rows = batch.shape[0]
    print(
        json.dumps(
            {
                "temporary_bytes": memory.temp_size_in_bytes,
                "host_bytes": memory.host_temp_size_in_bytes,
                "argument_bytes": memory.argument_size_in_bytes,
                "collectives": len([r for r in found if r.is_collective]),
                "sent_bytes": sum(sent.values()),
                "whole_batch": [str(r) for r in found if len(r.shape) >= 3 and rows in r.shape],
                "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
                "compile_seconds": round(time.perf_counter() - start, 1),
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", choices=BATCHES, default="vit")
    parser.add_argument("--mesh", default="1,16,1")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--dense", action="store_true")
    given = parser.parse_args()
    main(given.model, tuple(int(size) for size in given.mesh.split(",")), given.remat, given.dense)
