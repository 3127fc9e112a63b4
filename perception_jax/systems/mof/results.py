"""Results of training as folders: projectors (stage 1), LoRA with projectors, or a whole model.

Each is read back and compared by its logits before it is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from perception_jax import api
from perception_jax.api.multimodal import FIRST, load_projectors, save_projectors
from perception_jax.files import write_whole
from perception_jax.generate import IMAGE
from perception_jax.inference.batches import current_mesh
from perception_jax.interop import peft
from perception_jax.interop.verify import export_verified
from perception_jax.models.llava.formats import to_reference
from perception_jax.models.params import flatten, unflatten
from perception_jax.shard.mesh import mesh_of
from perception_jax.systems.mof.models import opened
from perception_jax.systems.mof.task import PROJECTORS

_FILE = f"{FIRST}.safetensors"


def write(loaded: api.Loaded, trains: str, workdir: pathlib.Path, *, probed: int) -> str:
    """Writes what `trains` says was trained; returns a line that describes it.

    - "projectors": `workdir/projectors`, under the authors' names;
    - "lora": `workdir/lora`, in PEFT's format with the authors' names, and the projectors;
    - "all": `workdir/llava`, the whole model in the authors' layout.

    Args:
      probed: tokens of text, behind an image, whose logits are compared.

    Raises:
      CheckpointError: the folder cannot be written, or gives other logits.
    """
    mesh = mesh_of(loaded.model)
    kinds = {
        "projectors": (save_projectors, _read_projectors, "projectors, the authors' names"),
        "lora": (_save_lora, _read_lora, f"LoRA for {loaded.name} in PEFT's format, projectors"),
        "all": (_save_whole, _read_whole, "the authors' layout"),
    }
    save, read, described = kinds[trains]
    folder = workdir / {"all": "llava"}.get(trains, trains)
    export_verified(
        folder,
        lambda path: save(loaded, path),
        lambda path: _logits(read(loaded, path, mesh), probed),
        _logits(loaded, probed),
        tolerance=1e-4,
    )
    return f"{folder} ({described}; loads back with equal logits)"


def is_part(source: str | os.PathLike[str]) -> bool:
    """Whether a folder has projectors, or LoRA with projectors, and no whole model."""
    folder = pathlib.Path(source)
    return (folder / _FILE).is_file() or (folder / peft.CONFIG).is_file()


def with_part(config: Any, source: str | os.PathLike[str], mesh: Mesh | None) -> api.Loaded:
    """The config's model with the projectors of a folder, and its LoRA if it has one."""
    config = config.copy_and_resolve_references()
    config.projectors = os.fspath(source)
    loaded = opened(config).load_weights(mesh=mesh)
    has_lora = (pathlib.Path(source) / peft.CONFIG).is_file()
    return api.load_lora(loaded, source) if has_lora else loaded


def _read_projectors(loaded: api.Loaded, path: Any, mesh: Mesh | None) -> api.Loaded:
    del mesh
    return load_projectors(_blank(loaded), path)


def _save_lora(loaded: api.Loaded, path: pathlib.Path) -> None:
    api.save_lora(loaded, path, layout="reference")
    save_projectors(loaded, path / "projectors")
    (path / "projectors" / _FILE).rename(path / _FILE)
    (path / "projectors").rmdir()
    settings = json.dumps(to_reference(loaded.config), indent=2)
    write_whole(path / "config.json", settings + "\n")


def _read_lora(loaded: api.Loaded, path: Any, mesh: Mesh | None) -> api.Loaded:
    del mesh
    return api.load_lora(load_projectors(_blank(loaded), path), path)


def _save_whole(loaded: api.Loaded, path: pathlib.Path) -> None:
    api.export(loaded, path, layout="reference")


def _read_whole(loaded: api.Loaded, path: Any, mesh: Mesh | None) -> api.Loaded:
    del loaded
    return api.load(path, mesh=mesh)


def _blank(loaded: api.Loaded) -> api.Loaded:
    """The model without LoRA and with projectors of zeros; other leaves are shared."""
    leaves = flatten(loaded.model)
    plain = api.without_weights(loaded.config, loaded.processor).model
    own = {
        path: jax.numpy.zeros_like(leaves[path])
        if path.startswith(tuple(f"{name}/" for name in PROJECTORS))
        else leaves[path]
        for path in flatten(plain)
    }
    return dataclasses.replace(loaded, model=unflatten(plain, own))


@functools.partial(jax.jit, static_argnums=2)
def _run(model: Any, pixels: jax.Array, probed: int) -> jax.Array:
    config = model.config
    ids = np.arange(1, probed + 1) % config.language.vocab_size
    row = np.concatenate([np.full(config.tokens_per_image, IMAGE), ids]).astype(np.int32)[None]
    return model(row, images=pixels).logits[:, -probed:]


def _logits(loaded: api.Loaded, probed: int) -> dict[str, np.ndarray]:
    """Logits of some tokens behind an image of noise."""
    side = loaded.config.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (1, 1, side, side, 3), np.uint8)
    with current_mesh(mesh_of(loaded.model)):
        return {"logits": np.asarray(_run(loaded.model, pixels, probed))}
