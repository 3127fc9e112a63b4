"""CLIP by shape alone at every published size, batch invariance, configs both ways."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perception_jax.errors import ConfigError
from perception_jax.interop.binding import bind
from perception_jax.models.clip.config import ClipConfig, TextConfig, VisionConfig
from perception_jax.models.clip.modeling import Clip
from perception_jax.models.clip.params import TABLES
from perception_jax.models.params import flatten
from perception_jax.models.shardings import SHARDINGS
from perception_jax.shard.mesh import make_mesh
from perception_jax.shard.rules import shardings
from tests.arrays import drawn, normal

# Millions of parameters; the ViT-L rows stand in the MMVP-VLM table (arXiv 2401.06209).
PUBLISHED = {
    "vit_b32": 151.3,
    "vit_b16": 149.6,
    "vit_l14": 427.6,
    "vit_l14_336": 427.9,
}

TINY = ClipConfig(
    vision=VisionConfig(image_size=32, patch_size=8, width=32, depth=2, heads=2, mlp_dim=64),
    text=TextConfig(vocab_size=64, context=8, width=24, depth=2, heads=2, mlp_dim=48),
    embed_dim=16,
)


def random_clip():
    return drawn(lambda: Clip(TINY, rngs=nnx.Rngs(params=0)))


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_size_by_shape_alone(size):
    config = getattr(ClipConfig, size)()
    model = nnx.eval_shape(lambda: Clip(config, rngs=nnx.Rngs(params=0)))
    leaves = flatten(model)
    millions = sum(leaf.size for leaf in leaves.values()) / 1e6
    assert round(millions, 1) == PUBLISHED[size]
    for table in TABLES.values():  # raises unless every leaf is covered exactly once
        bind(table(config), {path: leaf.shape for path, leaf in leaves.items()})
    for mesh in (make_mesh(1, 8, 1), make_mesh(2, 2, 2)):
        assert shardings(leaves, SHARDINGS, mesh).keys() == leaves.keys()


def test_heads_of_published_sizes():
    """Of open_clip's model files; no shape of a checkpoint depends on them."""
    expected = {"vit_b32": (12, 8), "vit_b16": (12, 8), "vit_l14": (16, 12), "vit_h14": (16, 16)}
    found = {size: getattr(ClipConfig, size)() for size in expected}
    assert {size: (c.vision.heads, c.text.heads) for size, c in found.items()} == expected


@pytest.mark.parametrize("size", PUBLISHED)
def test_config_survives_both_formats(size):
    config = getattr(ClipConfig, size)()
    assert ClipConfig.from_hf(config.to_hf()) == config
    assert ClipConfig.from_open_clip({"model_cfg": config.to_open_clip()}) == config


def test_batch_mates_and_padding_change_nothing():
    model, run = random_clip(), jax.jit(lambda model, pixels, ids: model(pixels, ids))
    pixels = np.asarray(normal(1, 8, 32, 32, 3))
    ids = np.full((8, 8), 63)
    ids[:, 0], ids[:, 1:4] = 62, np.arange(24).reshape(8, 3)
    together = run(model, pixels, ids)
    alone = [run(model, pixels[i : i + 1], ids[i : i + 1]) for i in range(8)]
    image = np.concatenate([out.image_embeds for out in alone])
    text = np.concatenate([out.text_embeds for out in alone])
    chex.assert_trees_all_close(
        jax.device_get((together.image_embeds, together.text_embeds)), (image, text), atol=1e-6
    )
    encode = jax.jit(lambda text, ids: text(ids).embedding)
    padded = encode(model.text, np.where(np.arange(8) < 5, ids, 0))
    chex.assert_trees_all_close(padded, encode(model.text, ids), atol=1e-6)
    chex.assert_trees_all_close(encode(model.text, ids[:, :5]), padded, atol=1e-6)


def test_bfloat16_input_computes_in_bfloat16_with_float32_weights():
    tower, encode = random_clip().vision, jax.jit(lambda tower, pixels: tower(pixels).tokens)
    pixels = np.asarray(normal(1, 2, 32, 32, 3))
    half = encode(tower, pixels.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    exact = np.asarray(encode(tower, pixels))
    np.testing.assert_allclose(np.asarray(half, np.float32), exact, atol=0.1, rtol=0)


def test_an_image_smaller_than_a_patch_is_refused():
    model = random_clip()
    with pytest.raises(ConfigError, match=r"at least one patch, 8×8 pixels, found 4×32"):
        model.vision(jnp.zeros((1, 4, 32, 3)))


def test_foreign_configurations_are_refused():
    with pytest.raises(ConfigError, match="vision_config"):
        ClipConfig.from_hf({"model_type": "bert"})
    timm = {"embed_dim": 8, "vision_cfg": {"timm_model_name": "eva"}, "text_cfg": {}}
    with pytest.raises(ConfigError, match="timm"):
        ClipConfig.from_open_clip(timm)
