"""A LLaVA on eight devices: the same loss and gradients, and no device gets all rows or images.

Sizes are chosen so that no other axis is as long as the batch or the images of the batch.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from perception_jax.generate import IMAGE
from perception_jax.models.llava import Llava
from perception_jax.models.params import flatten, unflatten
from perception_jax.models.registry import architecture_of
from perception_jax.ops.next_token import IGNORE, next_token_loss
from perception_jax.shard.mesh import make_mesh
from perception_jax.shard.program import results
from perception_jax.shard.rules import shardings
from perception_jax.testing import tiny_llava
from tests.arrays import drawn

ROWS, IMAGES, LENGTH = 88, 2, 52
CONFIGS = {"imof": tiny_llava.IMOF, "amof": tiny_llava.AMOF}
FROZEN = ("vision/", "second_vision/")


def batch(tokens):
    """Rows of two images, one, and none."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 90, (ROWS, LENGTH)).astype(np.int32)
    for row in range(ROWS):
        for k in range(row % 3):
            ids[row, 2 + k * (tokens + 1) : 2 + k * (tokens + 1) + tokens] = IMAGE
    pixels = rng.integers(0, 256, (ROWS, IMAGES, 24, 24, 3), np.uint8)
    return {"ids": ids, "image": pixels, "label": np.where(ids == IMAGE, IGNORE, ids)}


def losses(params, frozen, batch, model):
    own = unflatten(model, params | frozen)
    out = own(batch["ids"], None, batch["image"], head=False)
    return next_token_loss(out.tokens, own.logits, batch["label"], chunk=13).mean()


@pytest.mark.parametrize("name", CONFIGS)
def test_one_and_eight_devices_give_the_same_and_no_device_gets_all_rows(name):
    config = CONFIGS[name]
    model = drawn(lambda: Llava(config, rngs=nnx.Rngs(params=0)))
    leaves, rows = flatten(model), batch(config.tokens_per_image)
    frozen = {path: x for path, x in leaves.items() if path.startswith(FROZEN)}
    params = {path: x for path, x in leaves.items() if path not in frozen}
    step = jax.jit(lambda *given: jax.value_and_grad(losses)(*given, model))
    expected, gradients = step(params, frozen, rows)
    mesh = make_mesh(1, 4, 2)
    placed = shardings(leaves, architecture_of(config).shardings, mesh)
    split = jax.NamedSharding(mesh, jax.P(("replica", "fsdp")))
    given = (
        {path: jax.device_put(x, placed[path]) for path, x in params.items()},
        {path: jax.device_put(x, placed[path]) for path, x in frozen.items()},
        {key: jax.device_put(x, split) for key, x in rows.items()},
    )
    abstract = nnx.eval_shape(lambda: Llava(config, rngs=nnx.Rngs(params=0)))
    with jax.set_mesh(mesh):
        spread = jax.jit(lambda *given: jax.value_and_grad(losses)(*given, abstract))
        compiled = spread.lower(*given).compile()
        found, theirs = compiled(*given)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(theirs[path], gradient, atol=2e-5, err_msg=path)
    whole = [one for one in results(compiled) if {ROWS, ROWS * IMAGES} & set(one.shape)]
    assert not whole
    assert any({ROWS // 4, ROWS * IMAGES // 4} & set(one.shape) for one in results(compiled))
    assert all(np.abs(np.asarray(gradients[p])).max() > 0 for p in gradients if "projector" in p)
