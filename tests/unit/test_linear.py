"""Affine maps: what they compile to."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from flax import nnx

from perception_jax.nn.linear import Linear


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
