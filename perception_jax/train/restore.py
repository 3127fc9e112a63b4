"""Loads a trained model from a workdir for evaluation, prediction and export."""

from __future__ import annotations

import logging
import os
import pathlib

from flax import nnx
from jax.sharding import Mesh

from perception_jax.errors import CheckpointError
from perception_jax.shard import mesh as mesh_lib
from perception_jax.shard import rules as rules_lib
from perception_jax.train import checkpoint
from perception_jax.train.state import AbstractModel, Leaves, abstract_model, with_shardings
from perception_jax.train.task import Task

_log = logging.getLogger(__name__)


def load_model(
    task: Task,
    source: str | os.PathLike[str],
    *,
    step: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[nnx.Module, int]:
    """Reads only the weights of a checkpoint, straight to their devices.

    Args:
      task: of the same model as the run's.
      source: a workdir, or the directory of one checkpoint (`workdir/checkpoints/1000`).
      step: which checkpoint of a workdir; the newest by default.
      mesh: `shard.mesh.make_mesh()` by default.

    Returns:
      The model, with the moving average of its weights if the run kept one, and its step.

    A workdir may belong to a run in progress: if the newest checkpoint is replaced by a newer one
    while it is read, that one is read.

    Raises:
      CheckpointError: there is no such checkpoint, it is damaged, or it is of another model.
    """
    source = pathlib.Path(source).expanduser().resolve()
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    model = abstract_model(task)
    leaves = {**model.trainable, **model.frozen}
    target = with_shardings(leaves, rules_lib.shardings(leaves, task.shardings, mesh))
    path = _find(source, step)
    while True:
        try:
            return _read(path, model, target)
        except CheckpointError as error:
            newest = _find(source, step)
            if newest == path:
                raise
            _log.info("%s; reading %s instead", error, newest)
            path = newest


def _read(path: pathlib.Path, model: AbstractModel, target: Leaves) -> tuple[nnx.Module, int]:
    meta = checkpoint.read_meta(path)
    weights = "ema" if meta["ema"] else "trainable"
    saved = checkpoint.saved_shapes(path)
    # Rules of the run's optimizer may have frozen further leaves.
    fixed = {name for name in target if name in model.frozen or f"frozen/{name}" in saved}
    parts = checkpoint.read_leaves(
        path,
        {
            weights: {name: leaf for name, leaf in target.items() if name not in fixed},
            "frozen": {name: target[name] for name in fixed},
        },
    )
    return model.merge(parts[weights], parts["frozen"]), meta["step"]


def _find(source: pathlib.Path, step: int | None) -> pathlib.Path:
    if (source / "meta" / "meta.json").exists():
        return source
    folder = source / "checkpoints"
    found = checkpoint.steps(folder)
    if not found or (step is not None and step not in found):
        wanted = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        raise CheckpointError(
            f"expected {wanted} in {folder}, found {', '.join(map(str, found)) or 'none'}. Give "
            "the workdir of a training run, or a folder WORKDIR/checkpoints/STEP."
        )
    return folder / str(found[-1] if step is None else step)
