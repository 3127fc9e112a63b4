"""A model with separate layers gives what the stacked one gives: outputs, taps and gradients."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perception_jax.models.clip.config import ClipConfig, TextConfig, VisionConfig
from perception_jax.models.clip.modeling import Clip
from perception_jax.nn import stack
from perception_jax.nn.linear import Linear
from perception_jax.nn.taps import Taps
from tests.arrays import drawn, normal

CONFIG = ClipConfig(
    vision=VisionConfig(image_size=16, patch_size=8, width=16, depth=4, heads=2, mlp_dim=32),
    text=TextConfig(vocab_size=64, context=8, width=24, depth=2, heads=2, mlp_dim=48),
    embed_dim=16,
)
PIXELS = normal(1, 2, 16, 16, 3)
TAPS = Taps(attention=(1, -1), hidden=(0, 2, -1), rows=jnp.array([0, 3]))


@pytest.fixture(scope="module")
def model():
    return drawn(lambda: Clip(CONFIG, rngs=nnx.Rngs(params=0)))


def seen(tower, pixels, **options):
    """Outputs, and the gradient of their sum with respect to pixels and a probe."""

    def score(pixels, probes):
        out = tower(pixels, taps=TAPS.with_probes(probes), **options)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out.tokens)), out

    probes = jnp.zeros((2, 2, 2, 2, 5))
    return jax.jit(jax.grad(score, argnums=(0, 1), has_aux=True))(pixels, probes)


@pytest.mark.parametrize("options", [{}, {"depth": 3, "remat": True}], ids=str)
def test_outputs_taps_and_gradients_are_those_of_the_stack(model, options):
    separate = stack.separate(model, keep=True)
    expected = seen(model.vision, PIXELS, **options)
    found = seen(separate.vision, PIXELS, **options)
    chex.assert_trees_all_close(found, expected, atol=1e-6)
    ids = np.full((2, 8), 63)
    ids[:, 1] = 5
    encode = jax.jit(lambda text, ids: text(ids))
    chex.assert_trees_all_close(encode(separate.text, ids), encode(model.text, ids), atol=1e-6)


def test_the_model_itself_stays_as_it_was_and_once_is_enough(model):
    before = jax.tree.structure(model)
    once = stack.separate(model, keep=True)
    assert jax.tree.structure(model) == before
    assert stack.depth_of(once.vision.blocks) == 4
    chex.assert_trees_all_equal(stack.separate(once), once)


class Shift(nnx.Module):
    """Adds a map of what is given."""

    def __init__(self, rngs):
        self.map = Linear(16, 16, rngs=rngs)

    def __call__(self, x, given):
        return x + self.map(given)[:, None]

    def attention(self, x, given):
        return jax.nn.softmax(x @ self.map(given)[:, :, None])[:, None]


def test_inserts_and_a_batch_that_grows_at_the_first_of_them(model):
    tower = jax.tree.map(lambda leaf: leaf, model.vision)
    inserts = drawn(lambda: stack.init(Shift, 2, rngs=nnx.Rngs(params=0)), 3)
    tower.blocks = stack.Inserted(tower.blocks, inserts, (1, 3))
    given = normal(2, 6, 16)
    options = {
        "context": stack.Context(given=given, repeats=3),
        "taps": Taps(attention=(-1,), hidden=(3,), inserts=(1, 3)),
    }
    encode = jax.jit(lambda tower: tower(PIXELS, **options))
    expected = encode(tower)
    assert expected.tokens.shape[0] == 6
    chex.assert_trees_all_close(encode(stack.separate(tower, keep=True)), expected, atol=1e-6)
