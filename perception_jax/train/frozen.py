"""Frozen leaves, which no step changes: written once per workdir, named by what they are.

    WORKDIR/frozen/DIGEST/    leaves, and `files.json` (`train.integrity`) once all are written

Checkpoints hold the digest. The leaves of a checkpoint are looked up in its own folder
(`frozen/DIGEST`, for a checkpoint that was copied somewhere else), then in its workdir.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from perception_jax.errors import CheckpointError
from perception_jax.ops.sharding import gathered
from perception_jax.shard import distributed
from perception_jax.train import integrity
from perception_jax.train.state import Leaves, place_like

FOLDER = "frozen"
"""Folder of the frozen leaves in a workdir, or in a checkpoint that was copied."""

CHUNK_BYTES = 1 << 26
"""Arrays are stored in chunks of at most so many bytes; a process that restores on another mesh
reads those that its shards touch."""

_LEAVES = "leaves"
_log = logging.getLogger(__name__)


def digest(leaves: Mapping[str, jax.Array]) -> str:
    """32 hexadecimal digits for the leaves' paths, shapes, dtypes and bits, the same on any mesh.

    It is computed where the leaves are, and only sums leave the devices. On several processes it
    is a collective: all of them must call it. It detects accidents, not forgeries.
    """
    sums = gathered(_sums(dict(leaves)))
    lines = [
        f"{path} {leaf.dtype} {leaf.shape} {np.asarray(sums[path]).tolist()}"
        for path, leaf in sorted(leaves.items())
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


@jax.jit
def _sums(leaves: Leaves) -> Leaves:
    """Two sums of hashes of (bits, index), modulo 2^32: the order of the additions is all one."""
    return {path: jnp.stack([_sum(leaf, seed) for seed in (0, 1)]) for path, leaf in leaves.items()}


def _sum(leaf: Any, seed: int) -> Any:
    width = min(leaf.dtype.itemsize, 4)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    place = jnp.uint32(0x9E3779B9 * (seed + 1) & 0xFFFFFFFF)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) & 0xFFFFFFFF
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
    # The rounds of MurmurHash3's finaliser, first over the place, then over the bits at it.
    return jnp.sum(_mixed(_mixed(place) ^ bits), dtype=jnp.uint32)


def _mixed(x: Any) -> Any:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def write(root: pathlib.Path, name: str, leaves: Mapping[str, jax.Array]) -> pathlib.Path:
    """Writes leaves with the digest `name` to `root/name`, unless they are there.

    Each process writes its own shards; all of them must call this.

    Raises:
      Exception: of the file system or orbax; what was written before is not taken for whole.
    """
    folder = root / name
    missing = distributed.exchange("frozen leaves", integrity.find_damage(folder, contents=False))
    if not missing[0]:
        return folder
    if jax.process_index() == 0:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(f"{name}*"):  # by a run that was killed meanwhile
            shutil.rmtree(left)
    distributed.exchange("frozen leaves are removed", "")
    size = sum(leaf.nbytes for leaf in leaves.values()) / 2**30
    _log.info("writing %.2f GiB of frozen leaves to %s, once for this workdir", size, folder)
    with array_context():
        ocp.save_checkpointables(folder, {_LEAVES: dict(leaves)})
    own = integrity.checksums(folder, (jax.process_index(), jax.process_count()))
    parts = distributed.exchange("checksums of frozen leaves", json.dumps(own))
    if jax.process_index() == 0:
        integrity.write_list(folder, {k: v for part in parts for k, v in json.loads(part).items()})
    distributed.exchange("frozen leaves are written", "")
    return folder


def remove(folder: pathlib.Path) -> None:
    """Removes damaged leaves, so that `write` writes them again; all processes must call this."""
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    distributed.exchange("damaged frozen leaves are removed", "")


def find(checkpoint: pathlib.Path, name: str) -> pathlib.Path:
    """Folder of a checkpoint's frozen leaves, which need not exist."""
    beside = checkpoint / FOLDER / name
    return beside if beside.is_dir() else checkpoint.parent.parent / FOLDER / name


def read(folder: pathlib.Path, name: str, target: Leaves) -> Leaves:
    """Loads leaves straight to their shards, compares their digest, and casts them.

    Args:
      target: shapes with dtypes and shardings by path.

    Raises:
      Exception: of the file system or orbax, e.g. if memory runs out.
      CheckpointError: these are other leaves.
    """
    stored = ocp.checkpointables_metadata(folder).metadata[_LEAVES]
    as_stored = {
        path: jax.ShapeDtypeStruct(
            leaf.shape, stored[path].dtype if path in stored else leaf.dtype, sharding=leaf.sharding
        )
        for path, leaf in target.items()
    }
    loaded = ocp.load_checkpointables(folder, {_LEAVES: as_stored})[_LEAVES]
    found = digest(loaded)
    if found != name:
        raise CheckpointError(f"{folder} holds leaves with the digest {found}")
    return {path: place_like(leaf, target[path]) for path, leaf in loaded.items()}


def unusable(checkpoint: pathlib.Path, name: str, why: str) -> CheckpointError:
    """The error for a checkpoint whose frozen leaves are missing or damaged."""
    return CheckpointError(
        f"checkpoint {checkpoint} refers to frozen leaves with the digest {name}, expected in "
        f"{find(checkpoint, name)}: {why}. Copy the folder {FOLDER}/{name} of the run's workdir to "
        f"{checkpoint / FOLDER / name}, or make the pretrained weights available with which the "
        "run began and train with the same command: they are then written again."
    )


def array_context() -> ocp.Context:
    """How arrays are written: orbax's settings for checkpoints and frozen leaves."""
    context = ocp.Context()
    # Replicas share the writing of large leaves; each part is cut by a program of its own,
    # which for small leaves takes longer to compile than all of it to write.
    context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    return context
