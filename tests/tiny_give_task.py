"""GiVE's task around a tiny CLIP, on images of two colours."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from perception_jax.api import Loaded, Processor
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import ObjectAnnotation, Record
from perception_jax.data.tokenization import ClipTokenizer
from perception_jax.models.clip.modeling import Clip
from perception_jax.models.params import flatten, unflatten
from perception_jax.systems.give.adapter import AdapterConfig
from perception_jax.systems.give.model import GiveConfig
from perception_jax.systems.give.sampler import GroupConfig
from perception_jax.systems.give.task import GiveTask, GiveTaskConfig
from perception_jax.systems.give.training_data import TrainingData
from perception_jax.testing import tiny_clip

GROUPS = GroupConfig(groups=2, images=4, seed=3)


@functools.cache
def backbone_leaves() -> dict[str, np.ndarray]:
    model = jax.jit(lambda: Clip(tiny_clip.CONFIG, rngs=nnx.Rngs(params=7)))()
    return jax.device_get(flatten(model))


def make_task() -> GiveTask:
    abstract = nnx.eval_shape(lambda: Clip(tiny_clip.CONFIG, rngs=nnx.Rngs(params=0)))
    processor = Processor(
        image=ImageProcessor(size=tiny_clip.SIZE),
        tokenizer=ClipTokenizer.shipped(tiny_clip.VOCAB, tiny_clip.CONTEXT),
    )
    loaded = Loaded(
        name="tiny",
        model=unflatten(abstract, jax.tree.map(jnp.asarray, backbone_leaves())),
        config=tiny_clip.CONFIG,
        processor=processor,
    )
    data = TrainingData(records(), GROUPS, processor=processor.image, tokenizer=processor.tokenizer)
    config = GiveTaskConfig(
        model=GiveConfig(adapter=AdapterConfig(heads=2)), batch_size=GROUPS.batch_size
    )
    return GiveTask(config, loaded, data)


def records() -> list[Record]:
    """Left half in one colour, right half in another."""
    names, half = list(tiny_clip.COLOURS), tiny_clip.SIZE // 2
    made = []
    for k in range(24):
        rng = np.random.default_rng(k)
        image = rng.integers(0, 256, (tiny_clip.SIZE, tiny_clip.SIZE, 3)).astype(np.uint8)
        shown = rng.choice(len(names), 2, replace=False)
        for side, kind in enumerate(shown):
            image[:, side * half : (side + 1) * half] //= 2
            image[:, side * half : (side + 1) * half] += (
                np.uint8(tiny_clip.COLOURS[names[kind]]) // 2
            )
        objects = tuple(
            ObjectAnnotation(
                name=names[kind], box=None, captions=(f"{names[kind]} number {k % 5}",)
            )
            for kind in shown
        )
        made.append(Record(id=f"halves-{k}", images=(image,), objects=objects))
    return made
