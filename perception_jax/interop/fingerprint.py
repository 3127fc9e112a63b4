"""Fingerprints of weights, to compare two models without having both.

A fingerprint is a digest of a CRC-32 of each layer of each leaf. It is the same

- for every layout of checkpoint, as leaves are those of the loaded model;
- in float32 and in bfloat16: weights count as bfloat16 rounds them, so that a backbone loaded in
  half precision is still the same (and a change below that precision goes unseen);
- on any mesh, and for stacked layers (`blocks/…`), with inserts among them (`blocks/base/…`) or
  none, and layers with leaves of their own (`blocks/layers/K/…`);
- for images of another size: position embeddings, which are resized, do not count.

An exact one counts every bit of every leaf, to tell whether two models compute the same.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jaxtyping import Shaped, UInt16

from perception_jax.interop.export import on_host
from perception_jax.ops.sharding import gathered

_PLACE = re.compile(r"(?<=blocks/)(?:base/)*(?P<kind>stacks/\w+/)?(?:layers/(?P<layer>\d+)/)?")
"""Path components between the name of a stack and that of a leaf in a layer."""
_RESIZED = "position_embedding"
_CHUNK = 1 << 20


def fingerprint(leaves: Mapping[str, jax.Array | np.ndarray], *, exact: bool = False) -> str:
    """16 hexadecimal digits for a model's weights, read one layer at a time.

    On several processes it is a collective: all of them must call it.

    Args:
      leaves: by "/"-joined path.
      exact: whether dtypes, what bfloat16 rounds off and position embeddings count too.
    """
    lines = []
    for path, leaf in leaves.items():
        if path.endswith(_RESIZED) and not exact:
            continue
        place = _PLACE.search(path)
        name = _PLACE.sub(lambda found: found["kind"] or "", path)
        stacked = place is not None and place["layer"] is None
        first = int(place["layer"]) if place is not None and not stacked else 0
        for k, layer in enumerate(_layers(leaf, stacked)):
            lines.append(f"{name} {first + k} {layer.shape} {_checksum(layer, exact)}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def _layers(leaf: jax.Array | np.ndarray, stacked: bool) -> Iterator[Shaped[np.ndarray, "..."]]:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = gathered(leaf)
    return (on_host(leaf, k) for k in (range(len(leaf)) if stacked else (...,)))


def _checksum(layer: Shaped[np.ndarray, "..."], exact: bool) -> str:
    flat, total = np.ascontiguousarray(layer).reshape(-1), 0
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        total = zlib.crc32((part.view(np.uint8) if exact else _rounded(part)).data, total)
    return f"{layer.dtype} {total:08x}" if exact else f"{total:08x}"


def _rounded(values: Shaped[np.ndarray, " n"]) -> UInt16[np.ndarray, " n"]:
    """The bits of numbers as bfloat16, to the nearest and of two to the even one."""
    if values.dtype.name == "bfloat16":
        bits = values.view(np.uint16)
    else:
        wide = values.astype(np.float32, copy=False).view(np.uint32)
        bits = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)
    # Processors differ in whether they keep numbers below the normal ones, and the sign of 0.
    return np.where(bits & 0x7F80 == 0, np.uint16(0), bits)
