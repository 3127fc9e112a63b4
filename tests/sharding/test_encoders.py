"""Every encoder gives the same numbers alone and in a batch, on one device and on eight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import perception_jax
from perception_jax.api import Loaded, Processor
from perception_jax.data.processors import ImageProcessor
from perception_jax.models.clip.config import ClipConfig, VisionConfig
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.eva.config import EvaConfig, EvaVisionConfig
from perception_jax.models.params import flatten, unflatten
from perception_jax.models.registry import architecture_of
from perception_jax.models.siglip.config import SiglipConfig, SiglipVisionConfig
from perception_jax.nn.text_tower import TextConfig
from perception_jax.shard.mesh import make_mesh

SIZES = {"width": 32, "depth": 2, "heads": 2, "mlp_dim": 64}
IMAGE = {"image_size": 16, "patch_size": 4, **SIZES}
TEXT = {"vocab_size": 20, "context": 6, **SIZES}
CONFIGS = {
    "clip": ClipConfig(vision=VisionConfig(**IMAGE), text=TextConfig(**TEXT), embed_dim=16),
    "siglip": SiglipConfig(
        vision=SiglipVisionConfig(**IMAGE),
        text=TextConfig(**TEXT, pool="last", projection_bias=True),
    ),
    "eva": EvaConfig(
        vision=EvaVisionConfig(kind="eva02_rope", **IMAGE),
        text=TextConfig(**TEXT, act="gelu"),
        embed_dim=16,
        trunk="eva02_base_patch16_clip_224",
    ),
    "dinov2": Dinov2Config(**IMAGE, registers=2),
}


@jax.jit
def embed(model, pixels, ids):
    """Unit or pooled embeddings of images, and of texts where there are any."""
    if hasattr(model, "text"):
        out = model(pixels, ids)
        return out.image_embeds, out.text_embeds
    return (model(pixels).embedding,)


@pytest.mark.parametrize("name", CONFIGS)
def test_same_numbers_in_a_batch_and_on_eight_devices(tmp_path, name):
    config = CONFIGS[name]
    arch = architecture_of(config)
    model = nnx.eval_shape(lambda: arch.build(config, rngs=nnx.Rngs(params=0)))
    rng = np.random.default_rng(0)
    params = {
        path: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)
        for path, leaf in flatten(model).items()
    }
    model = unflatten(model, params)
    processor = Processor(image=ImageProcessor(size=16), tokenizer=None)
    loaded = Loaded(model=model, config=config, processor=processor)
    perception_jax.export(loaded, tmp_path / name, layout="jax")

    pixels = jnp.asarray(rng.normal(size=(8, 16, 16, 3)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 20, (8, 6)), jnp.int32)
    together = embed(model, pixels, ids)
    for k in (0, 5):
        for whole, alone in zip(together, embed(model, pixels[k, None], ids[k, None]), strict=True):
            np.testing.assert_allclose(alone[0], whole[k], atol=2e-6)

    mesh = make_mesh(2, 2, 2)
    placed = perception_jax.load(tmp_path / name, mesh=mesh)
    kernel = next(v for k, v in flatten(placed.model).items() if k.endswith("q_proj/kernel"))
    assert len(kernel.sharding.device_set) == 8
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    with jax.set_mesh(mesh):
        sharded = embed(placed.model, pixels, ids)
    for one, eight in zip(together, sharded, strict=True):
        np.testing.assert_allclose(eight, one, atol=1e-5)
