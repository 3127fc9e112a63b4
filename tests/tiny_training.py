"""A real task in small: a two-tower contrastive model on made-up pairs. Also a program, so that
tests can kill it: `python -m tests.tiny_training WORKDIR [key=value …]`.

Letters: B batch, F features.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import os
import pathlib
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from launch import compile_cache
from perception_jax.inference.batches import Batched
from perception_jax.ops import losses
from perception_jax.shard import distributed
from perception_jax.shard.rules import fsdp_largest_axis

RECORDS, IMAGE_FEATURES, TEXT_FEATURES, WIDTH = 64, 12, 6, 16


READING = grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)


class Frozen(nnx.Variable):
    """A leaf that does not train."""


class TwoTowers(nnx.Module):
    """image [B, 12], text [B, 6] → embeddings [B, 16]; the image is whitened by a frozen matrix."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.whiten = Frozen(jnp.eye(IMAGE_FEATURES) * 0.5)
        self.image = nnx.Linear(IMAGE_FEATURES, WIDTH, rngs=rngs)
        self.text = nnx.Linear(TEXT_FEATURES, WIDTH, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.float32(1.0))
        self.logit_bias = nnx.Param(jnp.float32(-1.0))


def record(index: int, poison: int) -> dict[str, Any]:
    """Pair `index`; its image is NaN if it is the poisoned one."""
    rng = np.random.default_rng(index)
    image = rng.normal(size=IMAGE_FEATURES).astype(np.float32)
    text = image[:TEXT_FEATURES] + 0.1 * rng.normal(size=TEXT_FEATURES).astype(np.float32)
    if index == poison:
        image[:] = np.nan
    return {"id": f"pair-{index}", "image": image, "text": text, "valid": index % 7 != 0}


@dataclasses.dataclass
class TinyTask:
    """See `train.task.Task`.

    Attributes:
      loss_name: "softmax" or "sigmoid".
      poison: index of the record that is NaN; -1 for none.
      repeat: whether the dataset is endless.
      noise: of the images; it comes from the step's key.
      scores: what the evaluator "scripted" returns, one after another.
      passes: of the evaluator "slow" over all records, a line of output for each; 0 omits it.
      traces: how often `loss` was traced.
    """

    loss_name: str = "softmax"
    batch_size: int = 16
    poison: int = -1
    repeat: bool = True
    noise: float = 1e-3
    scores: tuple[float, ...] = ()
    passes: int = 0
    traces: int = 0
    embed: Batched = dataclasses.field(
        default_factory=lambda: Batched(lambda model, rows: model.image(rows), batch_size=6)
    )

    trainable: Any = nnx.Param
    shardings: Any = (
        (r"^(image|text)/kernel$", PartitionSpec(None, ("fsdp", "tensor"))),
        (r".*", fsdp_largest_axis()),
    )

    def init(self, key: jax.Array) -> nnx.Module:
        return TwoTowers(nnx.Rngs(key))

    def pretrained(self, targets: Any) -> dict[str, Any]:
        return {}

    def loss(self, model: TwoTowers, batch: Any, key: jax.Array) -> Any:
        self.traces += 1
        noise = self.noise * jax.random.normal(key, batch["image"].shape)
        image = losses.unit(model.image((batch["image"] + noise) @ model.whiten[...]))
        text = losses.unit(model.text(batch["text"]))
        scale = jnp.exp(model.logit_scale[...].astype(jnp.float32))
        if self.loss_name == "softmax":
            loss = losses.softmax_contrastive(image, text, scale)
        else:
            bias = model.logit_bias[...].astype(jnp.float32)
            loss = losses.sigmoid_contrastive(image, text, scale, bias)
        return loss, {"valid": jnp.mean(batch["valid"].astype(jnp.float32))}

    def records(self) -> Any:
        """This host's records in order."""
        hosts = jax.process_count()
        pairs = grain.MapDataset.range(RECORDS).seed(3).shuffle()
        if self.repeat:
            pairs = pairs.repeat()
        # Hosts take turns, so that together they see the batches of a single one.
        return pairs[jax.process_index() :: hosts].map(lambda i: record(int(i), self.poison))

    def datasets(self) -> dict[str, Any]:
        rows = self.records().to_iter_dataset(READING)
        return {"train": rows.batch(self.batch_size // jax.process_count(), drop_remainder=True)}

    def evaluators(self) -> dict[str, Any]:
        def norm(model: TwoTowers, mesh: Mesh) -> dict[str, float]:
            return {"kernel": float(jnp.linalg.norm(model.image.kernel[...]))}

        def scripted(model: TwoTowers, mesh: Mesh) -> dict[str, float]:
            score, *self.scores = self.scores
            return {"score": score}

        images = np.stack([record(k, -1)["image"] for k in range(RECORDS)])

        def rows(model: TwoTowers, mesh: Mesh) -> dict[str, float]:
            found = self.embed(model, images, mesh)
            return {"first": float(found[0, 0]), "last": float(found[-1, 0])}

        def slow(model: TwoTowers, mesh: Mesh) -> dict[str, float]:
            for number in range(self.passes):
                print("pass", number, flush=True)
                time.sleep(0.05)
                self.embed(model, images, mesh)
            return {"passes": self.passes}

        optional = {"scripted": (scripted, self.scores), "slow": (slow, self.passes)}
        return {
            "norm": norm,
            "rows": rows,
            **{name: run for name, (run, wanted) in optional.items() if wanted},
        }


@dataclasses.dataclass
class Bucketed(TinyTask):
    """`TinyTask` with texts of several tokens, padded to the length of one of several buckets.

    Attributes:
      buckets: lengths; batches take turns, two at a time.
      declared: lengths that the task declares; () for the buckets.
      shift: of the turns, for a process that disagrees with the others.
    """

    buckets: tuple[int, ...] = (3, 5)
    declared: tuple[int, ...] = ()
    shift: int = 0

    def batch_shapes(self) -> list[Any]:
        def rows(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.batch_size, *shape), dtype)

        return [
            {
                "image": rows(IMAGE_FEATURES),
                "text": rows(length, TEXT_FEATURES),
                "text_mask": rows(length, dtype=jnp.bool_),
                "valid": rows(dtype=jnp.bool_),
            }
            for length in self.declared or self.buckets
        ]

    def loss(self, model: TwoTowers, batch: Any, key: jax.Array) -> Any:
        mask = batch["text_mask"]
        text = jnp.sum(batch["text"], axis=1, where=mask[..., None]) / mask.sum(1, keepdims=True)
        # A product with every token, so that a longer bucket has more FLOPs.
        seen = jnp.mean(model.text(batch["text"]) ** 2)
        loss, metrics = super().loss(model, {**batch, "text": text}, key)
        return loss + 1e-3 * seen, {**metrics, "tokens": jnp.sum(mask)}

    def datasets(self) -> dict[str, Any]:
        batches = self.records().batch(self.batch_size // jax.process_count(), drop_remainder=True)
        return {"train": batches.map_with_index(self._padded).to_iter_dataset(READING)}

    def _padded(self, index: int, batch: dict[str, Any]) -> dict[str, Any]:
        length = self.buckets[(index // 2 + self.shift) % len(self.buckets)]
        tokens = 1 + np.arange(len(batch["text"])) % length
        mask = np.arange(length) < tokens[:, None]
        text = np.where(mask[..., None], batch["text"][:, None], np.float32(0))
        return {**batch, "text": text, "text_mask": mask, "unused": text}


@contextlib.contextmanager
def program(root: pathlib.Path, workdir: pathlib.Path, **settings: Any) -> Iterator[Any]:
    """`main` as a process of its own; killed at the end if it still runs."""
    arguments = [f"{key}={value!r}" for key, value in settings.items()]
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.tiny_training", str(workdir), *arguments],
        cwd=root,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def wait_for_step(child: Any, step: int) -> None:
    """Reads a child's output until it has done `step`."""
    wait_for_line(child, f"step {step}")


def wait_for_line(child: Any, expected: str) -> None:
    """Reads a child's output up to that line."""
    for line in child.stdout:
        if line.rstrip("\n") == expected:
            return
    raise AssertionError(f"ended before {expected!r}: {child.stderr.read()}")


def read_arrays(path: pathlib.Path, name: str) -> Any:
    """The arrays in one folder of a checkpoint, as orbax alone reads them."""
    from orbax.checkpoint import v1 as ocp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it takes the shardings from the files
        return ocp.load_checkpointables(path, {name: None})[name]


def main(argv: list[str]) -> None:
    """Trains; the settings are those of `TrainConfig`, and:

    - pause: seconds per step;
    - hold_at: after this step, waits for a checkpoint to be finished;
    - full: from there on, no file may grow beyond 1,500 bytes (as close to a full disk as a process
      can bring itself);
    - processes, process, port: one of several processes with `devices` (2) each, which waits
      `join_seconds` for the others;
    - fail_at: after this step, it raises an error;
    - noise, passes, repeat: of the task; buckets, shift: of a `Bucketed` one.
    """
    workdir, *pairs = argv
    settings = {key: ast.literal_eval(value) for key, value in (pair.split("=") for pair in pairs)}
    pause, hold_at = settings.pop("pause", 0.0), settings.pop("hold_at", -1)
    full, fail_at = settings.pop("full", False), settings.pop("fail_at", -1)
    names = ("noise", "passes", "repeat", "buckets", "shift")
    own = {key: settings.pop(key) for key in names if key in settings}
    task = Bucketed(**own) if "buckets" in own else TinyTask(**own)
    if "processes" in settings:
        compile_cache.skip_several_cpu_devices()
        jax.config.update("jax_num_cpu_devices", settings.pop("devices", 2))
        port, count, index = (settings.pop(key) for key in ("port", "processes", "process"))
        distributed.initialize(
            True,
            timeout_seconds=settings.pop("join_seconds", 300),
            heartbeat_seconds=settings.get("heartbeat_seconds", 60.0),
            coordinator_address=f"localhost:{port}",
            num_processes=count,
            process_id=index,
        )

    from perception_jax.train import checkpoint, loop
    from perception_jax.train.config import TrainConfig

    def after(step: int) -> bool:
        print("step", step, flush=True)
        time.sleep(pause)
        if step == fail_at:
            raise ValueError("no such row")
        if step == hold_at:
            while not checkpoint.steps(pathlib.Path(workdir, "checkpoints")):
                time.sleep(0.01)
            if full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
        return False

    config = TrainConfig.from_mapping({"batch_size": 16, "log_every": 1, **settings})
    result = loop.run(task, config, workdir, stop=after)
    print("finished" if result.finished else "stopped", result.step, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
