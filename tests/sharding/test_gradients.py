"""Gradients on a mesh with all axes are those of one device, for every kind of model.

Equal losses do not show this: XLA's partitioner gives wrong gradients, with the right loss, for
chains of kernels that are split alike over two axes (see `test_a_chain_of_kernels`), at some sizes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from perception_jax.generate import IMAGE
from perception_jax.models.params import flatten, unflatten
from perception_jax.ops.next_token import IGNORE
from perception_jax.shard.mesh import batch_sharding, make_mesh
from perception_jax.shard.rules import shardings
from tests.sharding import test_compiled_steps as steps

ROWS = 32
"""A number at which the fault shows; at 16 and at 128 it does not."""
PLACES = slice(2, 10)
"""Of an image in a row of the language model."""


def drawn(path: Any, leaf: jax.ShapeDtypeStruct, rng: np.random.Generator) -> np.ndarray:
    """An array of a batch: pixels, token ids, numbers of rows, or features."""
    name = jax.tree_util.keystr(path)
    if leaf.dtype == jnp.bool_:
        return np.ones(leaf.shape, bool)
    if leaf.dtype == jnp.uint8:
        return rng.integers(0, 256, leaf.shape).astype(np.uint8)
    if not jnp.issubdtype(leaf.dtype, jnp.integer):
        return rng.normal(size=leaf.shape).astype(leaf.dtype)
    most = ROWS // 2 if leaf.ndim == 1 else steps.WORDS_SPLIT
    return rng.integers(0 if "group" in name else 1, most, leaf.shape).astype(leaf.dtype)


def batch_of(name: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = dict(steps.TASKS[name][1]())
    batch = jax.tree_util.tree_map_with_path(lambda path, x: drawn(path, x, rng), shapes)
    if name == "mof":
        batch["ids"][:, PLACES], batch["label"][:, PLACES] = IMAGE, IGNORE
    return batch


FEW = ("siglip", "mof")
"""With a pooling head, and with projectors; `make test` runs these."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FEW else pytest.mark.slow)
        for name in steps.TASKS
        if name != "llama_lora"  # its dropout would need equal keys
    ],
)
def test_gradients_on_all_axes_are_those_of_one_device(name, monkeypatch):
    monkeypatch.setattr(steps, "BATCH", ROWS)
    task, batch, mesh = steps.TASKS[name][0](), batch_of(name), make_mesh(2, 2, 2)
    model = jax.jit(lambda: task.init(jax.random.key(0)))()
    leaves = flatten(model)

    def loss(params, batch):
        return task.loss(unflatten(model, params), batch, jax.random.key(1))[0]

    gradient = jax.value_and_grad(loss)
    value, expected = jax.jit(gradient)(leaves, batch)
    with jax.set_mesh(mesh):
        placed = shardings(leaves, task.shardings, mesh)
        split = jax.device_put(batch, batch_sharding(mesh))
        run = jax.jit(gradient, out_shardings=(None, placed))
        found_value, found = run(jax.device_put(leaves, placed), split)
    np.testing.assert_allclose(found_value, value, rtol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in expected.values())
    for path, leaf in expected.items():
        # The gradient of a bias of keys is 0 but for rounding.
        atol = 2e-3 * max(float(jnp.abs(leaf).max()), 1e-4 * largest)
        np.testing.assert_allclose(found[path], leaf, atol=atol, rtol=0, err_msg=path)


def test_a_chain_of_kernels():
    """Why no rule splits two matrices in a row alike over "fsdp" and "tensor", in plain JAX.

    If this fails, XLA has been mended, and the rules may use such chains.
    """
    mesh = make_mesh(2, 2, 2)
    kernels = [0.2 * jax.random.normal(jax.random.key(k), (32, 32)) for k in range(3)]
    rows = jax.random.normal(jax.random.key(9), (ROWS, 32))

    def loss(kernels, rows):
        for kernel in kernels:
            rows = jax.nn.relu(rows @ kernel)
        return jnp.mean(rows**2)

    def error(rule: P) -> float:
        where = [NamedSharding(mesh, rule)] * 3
        run = jax.jit(jax.grad(loss), in_shardings=(where, batch_sharding(mesh)))
        found = run(jax.device_put(kernels, where), jax.device_put(rows, batch_sharding(mesh)))
        return max(
            float(jnp.abs(ours - np.asarray(theirs)).max() / jnp.abs(ours).max())
            for ours, theirs in zip(expected, found, strict=True)
        )

    expected = jax.jit(jax.grad(loss))(kernels, rows)
    assert error(P("fsdp")) < 1e-5
    assert error(P("fsdp", "tensor")) > 0.1
