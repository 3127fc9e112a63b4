"""Fingerprints of weights: whether two models have the same ones, without comparing them.

A fingerprint is made of one checksum for each layer of each leaf: a sum, modulo 2^32, of the
weights' bits times odd factors that depend on their place. Sums do not depend on their order, so
that sharded leaves are summed where they lie, and only checksums travel. It is the same

- in float32 and bfloat16: weights count as bfloat16 rounds them, so that a backbone which was
  loaded in half precision is still the same (and a change below that precision goes unseen);
- for any mesh, and for stacked layers, layers with inserts among them and `nn.stack.separate`;
- for images of another size: position embeddings, which are resized, do not count.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32

from perception_jax.ops.sharding import gathered

_PLACE = re.compile(r"(?<=blocks/)(?:base/)*(?P<kind>stacks/\w+/)?(?:layers/(?P<layer>\d+)/)?")
_RESIZED = "position_embedding"


def fingerprint(leaves: Mapping[str, Shaped[Array | np.ndarray, "..."]]) -> str:
    """16 hexadecimal digits for a model's weights.

    On several processes it is a collective: all of them must call it.

    Args:
      leaves: by path, as `models.params.flatten` gives them.
    """
    counted = {path: leaf for path, leaf in leaves.items() if not path.endswith(_RESIZED)}
    stacked = frozenset(path for path in counted if _is_stacked(path))
    lines = []
    for path, sums in gathered(_checksums(counted, stacked)).items():
        layer = _PLACE.search(path)
        name = _PLACE.sub(lambda found: found["kind"] or "", path)
        first = int(layer["layer"]) if layer and layer["layer"] else 0
        lines += [f"{name} {first + k} {value:08x}" for k, value in enumerate(sums.tolist())]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def _is_stacked(path: str) -> bool:
    """Whether the first axis of a leaf is that of layers."""
    found = _PLACE.search(path)
    return bool(found) and found["layer"] is None


def _sum_layers(leaf: Shaped[Array, "..."], stacked: bool) -> UInt32[Array, " L"]:
    layers = leaf if stacked else leaf[None]
    bits = jax.lax.bitcast_convert_type(layers.astype(jnp.bfloat16), jnp.uint16)
    # Processors differ in whether they keep numbers too small for a full mantissa.
    bits = jnp.where(bits & 0x7F80 == 0, 0, bits).astype(jnp.uint32)
    shape = layers.shape[1:]
    place = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    factor = (place + 1) * jnp.uint32(0x9E3779B1)
    factor = (factor ^ (factor >> 15)) * jnp.uint32(0x85EBCA77) | 1
    return jnp.sum((bits + 1) * factor, axis=tuple(range(1, layers.ndim)), dtype=jnp.uint32)


@functools.partial(jax.jit, static_argnames="stacked")
def _checksums(
    leaves: Mapping[str, Array], stacked: frozenset[str]
) -> dict[str, UInt32[Array, " _"]]:
    return {path: _sum_layers(leaf, path in stacked) for path, leaf in leaves.items()}
