"""Affine maps: what they compile to."""

from __future__ import annotations

import re

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from perception_jax.nn.linear import Linear, product


def test_the_gradient_of_a_kernel_transposes_nothing_in_memory():
    graph, leaves = nnx.split(Linear(24, 40, rngs=nnx.Rngs(0)))

    def loss(leaves: nnx.State, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(nnx.merge(graph, leaves)(x)))

    x = jax.random.normal(jax.random.key(0), (4, 16, 24))
    compiled = jax.jit(jax.grad(loss)).lower(leaves, x).compile().as_text()
    products = re.findall(r"\bdot\(.*lhs_contracting_dims={([\d,]*)}", compiled)
    assert sorted(products) == ["0", "1"], compiled
    # 64 rows: the gradient of the outputs is [64, 40].
    assert not re.search(r"f32\[40,(64|4,16)\]|f32\[40,64\]\{0,1\}", compiled), compiled


@pytest.fixture
def wide() -> tuple[jax.Array, jax.Array]:
    """Rows and a kernel whose product has a derivative of its own."""
    keys = jax.random.split(jax.random.key(1))
    return jax.random.normal(keys[0], (2, 3, 512)), jax.random.normal(keys[1], (512, 520))


def _loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(product(x, kernel) / 20))


def test_a_wide_kernel_gets_its_gradient_from_a_product_along_rows(wide):
    compiled = jax.jit(jax.grad(_loss, 1)).lower(*wide).compile().as_text()
    assert re.findall(r"\bdot\(.*lhs_contracting_dims={([\d,]*)}", compiled) == ["1", "1"], compiled


def _plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(x @ kernel / 20))


@pytest.mark.parametrize(
    "transformed",
    [
        lambda loss: jax.grad(loss, (0, 1)),
        lambda loss: jax.grad(loss, 1),
        lambda loss: lambda x, kernel: jax.jvp(loss, (x, kernel), (jnp.cos(x), jnp.cos(kernel))),
        lambda loss: lambda x, kernel: jax.jvp(
            lambda x: jax.grad(loss, 1)(x, kernel), (x,), (jnp.cos(x),)
        ),
        lambda loss: lambda x, kernel: jax.vmap(jax.grad(loss, 1), (0, None))(x[:, None], kernel),
        lambda loss: jax.grad(jax.checkpoint(loss), (0, 1)),
    ],
    ids=["both", "kernel", "forward mode", "second order", "per example", "recomputed"],
)
def test_a_wide_product_has_the_derivatives_of_a_matrix_product(wide, transformed):
    ours, plain = (jax.jit(transformed(loss))(*wide) for loss in (_loss, _plain))
    chex.assert_trees_all_close(ours, plain, rtol=1e-4, atol=1e-5)
