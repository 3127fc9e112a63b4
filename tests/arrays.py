"""Random arrays and models drawn by numpy: nothing is compiled to make what a test starts from.

`jax.random` compiles a program per shape, and a model built eagerly one per shape of its leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from perception_jax.models.params import flatten, unflatten

Model = TypeVar("Model", bound=nnx.Module)


def run(model: nnx.Module, *inputs: Any, **options: Any) -> Any:
    """Returns `model(*inputs, **options)` from one compiled program."""
    return jax.jit(lambda model, inputs: model(*inputs, **options))(model, inputs)


def normal(seed: int, *shape: int) -> jax.Array:
    """A float32 array of standard normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def drawn(make: Callable[[], Model], seed: int = 0) -> Model:
    """What `make()` builds, with every leaf drawn at random.

    Kernels halve the standard deviation of their input. Norms, biases and layer scales, which start
    as ones and zeros, differ from these, so that no test passes by leaving one of them out.
    """
    model = nnx.eval_shape(make)
    rng = np.random.default_rng(seed)
    leaves = {path: _leaf(path, leaf, rng) for path, leaf in flatten(model).items()}
    return unflatten(model, leaves)


def _leaf(path: str, leaf: jax.ShapeDtypeStruct, rng: np.random.Generator) -> jax.Array:
    name = path.rsplit("/", 1)[-1]
    noise = rng.normal(size=leaf.shape)
    if name == "logit_scale":
        value = np.full(leaf.shape, math.log(1 / 0.07))
    elif name == "kernel":
        inputs = leaf.shape[:-1] if "patch_embed" in path else leaf.shape[-2:-1]
        value = 0.5 * noise * math.prod(inputs) ** -0.5
    elif name.startswith("scale"):
        value = 1 + 0.1 * noise
    else:
        value = 0.1 * noise
    return jnp.asarray(value, leaf.dtype)
