"""The compiled training step keeps the batch, the gradients and the optimizer's state split.

Equal loss curves cannot show this: a step that gathers the whole global batch on every device gives
the same numbers. Sizes are chosen so that no other axis is as long as the batch or a part of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from perception_jax.api import Loaded, Processor
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.tokenization import ClipTokenizer
from perception_jax.models.clip.config import ClipConfig, VisionConfig
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.eva.config import EvaConfig, EvaVisionConfig
from perception_jax.models.llama.config import LlamaConfig
from perception_jax.models.llava.config import LlavaConfig
from perception_jax.models.registry import architecture_of
from perception_jax.models.shardings import SHARDINGS
from perception_jax.models.siglip.config import SiglipConfig, SiglipVisionConfig
from perception_jax.models.towers import TowerConfig
from perception_jax.nn.lora import LoraConfig
from perception_jax.nn.text_tower import TextConfig
from perception_jax.ops.image import normalise
from perception_jax.ops.losses import softmax_contrastive, unit
from perception_jax.shard import mesh as mesh_lib
from perception_jax.shard import program
from perception_jax.systems.contrastive.data import ContrastiveData
from perception_jax.systems.contrastive.task import ContrastiveConfig, ContrastiveTask
from perception_jax.systems.give.adapter import AdapterConfig
from perception_jax.systems.give.model import GiveConfig
from perception_jax.systems.give.task import GiveTask, GiveTaskConfig
from perception_jax.systems.mof.task import MofTask, MofTaskConfig
from perception_jax.systems.text.task import TextTask, TextTaskConfig
from perception_jax.train import state as state_lib
from perception_jax.train.config import TrainConfig
from perception_jax.train.optim import make_optimizer
from perception_jax.train.step import CompiledStep, compile_step, make_step

MESHES = {"8x1": (1, 8, 1), "4x2": (1, 4, 2), "2x2x2": (2, 2, 2)}
ALL = "2x2x2"
"""Mesh with all axes, on which the usual tests compile all tasks."""
EVERYWHERE = ("clip", "llama")
"""Tasks that the usual tests compile on all meshes."""
BATCH, SIDE, TEXT, VOCABULARY = 88, 16, 6, 1000
SIZES = {"width": 32, "depth": 3, "heads": 4, "mlp_dim": 64}
IMAGE = {"image_size": SIDE, "patch_size": 8, **SIZES}
WORDS = {"vocab_size": VOCABULARY, "context": TEXT, **SIZES}
CLIP = ClipConfig(vision=VisionConfig(**IMAGE), text=TextConfig(**WORDS), embed_dim=16)
CONFIGS = {
    "siglip": SiglipConfig(
        vision=SiglipVisionConfig(**IMAGE),
        text=TextConfig(**WORDS, pool="last", projection_bias=True),
    ),
    "dinov2": Dinov2Config(**IMAGE, registers=2),
    "eva": EvaConfig(
        vision=EvaVisionConfig(kind="eva02_rope", **IMAGE),
        text=TextConfig(**WORDS, act="gelu"),
        embed_dim=16,
        trunk="eva02_base_patch16_clip_224",
    ),
}
PROCESSOR = ImageProcessor(size=SIDE)
ROW, WORDS_SPLIT = 20, 96
"""Tokens of a row of the language model, and its vocabulary."""
LLAMA = LlamaConfig(
    vocab_size=WORDS_SPLIT,
    context=64,
    kv_heads=4,
    head_width=8,
    **SIZES | {"width": 40, "mlp_dim": 72},
)


@dataclasses.dataclass(frozen=True)
class EncoderTask:
    """Trains all of an encoder: images against texts, or class tokens against patches."""

    config: Any
    trainable: Any = nnx.Param
    shardings: Any = SHARDINGS

    def init(self, key: jax.Array) -> nnx.Module:
        return architecture_of(self.config).build(self.config, rngs=nnx.Rngs(params=key))

    def pretrained(self, targets: Any) -> Any:
        return {}

    def datasets(self) -> Any:
        return {}

    def evaluators(self) -> Any:
        return {}

    def loss(self, model: nnx.Module, batch: Mapping[str, jax.Array], key: jax.Array) -> Any:
        pixels = normalise(batch["image"], PROCESSOR.mean, PROCESSOR.std)
        if isinstance(self.config, Dinov2Config):
            out = model(pixels, remat=True)
            left, right = out.pooled, jnp.mean(out.patches, axis=1)
        else:
            left = model.vision(pixels, remat=True).embedding
            right = model.text(batch["ids"], remat=True).embedding
        return softmax_contrastive(unit(left), unit(right), jnp.float32(10.0)), {}


@pytest.fixture(autouse=True, scope="module")
def only_partitioned():
    """The programs are read, not run: code generation need not try hard (half the time)."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((BATCH, *shape), dtype)


def clip_task() -> ContrastiveTask:
    processor = Processor(image=PROCESSOR, tokenizer=ClipTokenizer.shipped(VOCABULARY, TEXT))
    return ContrastiveTask(
        ContrastiveConfig(), CLIP, data=ContrastiveData([], processor, batch_size=BATCH, seed=0)
    )


def give_task() -> GiveTask:
    model = nnx.eval_shape(lambda: architecture_of(CLIP).build(CLIP, rngs=nnx.Rngs(params=0)))
    processor = Processor(image=PROCESSOR, tokenizer=None)
    backbone = Loaded(name="tiny", model=model, config=CLIP, processor=processor)
    # The first block has no adapter: both encodings of an image share it.
    config = GiveConfig(layers=(1, 2), adapter=AdapterConfig(heads=4))
    return GiveTask(GiveTaskConfig(model=config, batch_size=BATCH, remat="full"), backbone, None)


def text_task(lora: LoraConfig | None) -> TextTask:
    model = nnx.eval_shape(lambda: architecture_of(LLAMA).build(LLAMA, rngs=nnx.Rngs(params=0)))
    processor = Processor(image=None, tokenizer=None)
    base = Loaded(name="tiny", model=model, config=LLAMA, processor=processor)
    return TextTask(TextTaskConfig(batch_size=BATCH, length=ROW, lora=lora, chunk=7), base, None)


def text_batch() -> dict[str, Any]:
    (batch,) = text_task(None).batch_shapes()
    return batch


def mof_task() -> MofTask:
    towers = (TowerConfig(vision=VisionConfig(**IMAGE)), CONFIGS["dinov2"])
    config = LlavaConfig(language=LLAMA, towers=towers, mixing="interleaved")
    base = Loaded(
        name="tiny",
        model=nnx.eval_shape(
            lambda: architecture_of(config).build(config, rngs=nnx.Rngs(params=0))
        ),
        config=config,
        processor=Processor(image=None, tokenizer=None),
    )
    settings = MofTaskConfig(batch_size=BATCH, lengths=(ROW,), trains="all", chunk=7)
    return MofTask(settings, base, None)


def mof_batch() -> dict[str, Any]:
    (batch,) = mof_task().batch_shapes()
    return batch


def encoder_batch() -> dict[str, Any]:
    return {
        "image": array(SIDE, SIDE, 3, dtype=jnp.uint8),
        "ids": array(TEXT, dtype=jnp.int32),
        "id_mask": array(TEXT, dtype=jnp.bool_),
    }


def give_batch() -> dict[str, Any]:
    instruction = {
        "states": array(TEXT, SIZES["width"]),
        "mask": array(TEXT, dtype=jnp.bool_),
        "embedding": array(16),
    }
    number = array(dtype=jnp.int32)
    return {
        "image": array(SIDE, SIDE, 3, dtype=jnp.uint8),
        "ids": array(TEXT, dtype=jnp.int32),
        "image_index": number,
        "label": number,
        "caption_index": number,
        "instruction": instruction,
        "absent_instruction": instruction,
    }


TASKS = {
    "clip": (clip_task, encoder_batch, 1),
    **{
        name: (functools.partial(EncoderTask, config), encoder_batch, 1)
        for name, config in CONFIGS.items()
    },
    "give": (give_task, give_batch, 2),
    "mof": (mof_task, mof_batch, 1),
    "llama": (functools.partial(text_task, None), text_batch, 1),
    "llama_lora": (
        functools.partial(text_task, LoraConfig(rank=16, alpha=1.0, dropout=0.1)),
        text_batch,
        1,
    ),
}
"""Makes the task, its batch's shapes; how many rows of the model an example becomes at most."""


def compiled(name: str, mesh: jax.sharding.Mesh) -> tuple[CompiledStep, Any, Any]:
    """The step as the trainer compiles it, with the state's shapes and shardings."""
    make_task, make_batch, _ = TASKS[name]
    task = make_task()
    config = TrainConfig.from_mapping({"steps": 5, "batch_size": BATCH})
    with jax.set_mesh(mesh):
        model = state_lib.abstract_model(task)
        optimizer = make_optimizer(config.optim, config.steps, model.trainable)
        abstract = state_lib.abstract_state(model, optimizer.transform, ema=False)
        placed = state_lib.state_shardings(abstract, task.shardings, mesh)
        step = make_step(task, model, optimizer, config=config)
        return compile_step(step, abstract, placed, make_batch(), mesh), abstract, placed


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(
            name, mesh, marks=() if name in EVERYWHERE or mesh == ALL else pytest.mark.slow
        )
        for name in TASKS
        for mesh in MESHES
    ],
)
def test_no_device_holds_more_than_its_share(name, mesh):
    mesh = mesh_lib.make_mesh(*MESHES[mesh])
    step, abstract, placed = compiled(name, mesh)
    found = set(program.results(step.call))
    assert any(result.is_collective for result in found)  # the text was read

    shards, rows = mesh_lib.batch_shards(mesh), TASKS[name][2]
    own = {BATCH // shards * k for k in range(1, rows + 1)}
    more = {BATCH * k // n for k in range(1, rows + 1) for n in (1, 2, 4)} - own
    whole_batch = [
        r for r in found if (len(r.shape) >= 3 and more & set(r.shape)) or r.shape == (BATCH, BATCH)
    ]
    assert not whole_batch

    # Weights are gathered layer by layer, and their gradients never stand whole on a device.
    trained = {**abstract.trainable, **abstract.frozen}
    where = {**placed.trainable, **placed.frozen}
    stacked = {
        leaf.shape
        for path, leaf in trained.items()
        if "blocks" in path and leaf.ndim == 3 and not where[path].is_fully_replicated
    }
    assert stacked
    assert not [result for result in found if result.shape in stacked]

    # Moments lie where their parameters lie.
    moments = jax.tree.leaves_with_path(placed.opt_state)
    for path, leaf in abstract.trainable.items():
        own_moments = [where for keys, where in moments if keys[-1] == jax.tree_util.DictKey(path)]
        assert len(own_moments) == 2
        assert all(where == placed.trainable[path] for where in own_moments), (path, leaf)


@pytest.mark.parametrize("name", ["llama", "llama_lora"])
def test_the_vocabulary_of_a_language_model_stays_split(name):
    """Neither logits nor their gradient, nor the tables, are whole on a chip in any array."""
    step, abstract, placed = compiled(name, mesh_lib.make_mesh(*MESHES["4x2"]))
    found = [r for r in program.results(step.call) if r.dtype.startswith(("f", "bf"))]
    assert not [result for result in found if WORDS_SPLIT in result.shape]
    assert [result for result in found if WORDS_SPLIT // 2 in result.shape]
    where = {**placed.trainable, **placed.frozen}
    shapes = {**abstract.trainable, **abstract.frozen}
    for path in ("token_embedding", "lm_head/kernel"):
        (rows, columns), own = shapes[path].shape, where[path].shard_shape(shapes[path].shape)
        assert own[0] * own[1] * 8 == rows * columns
    # Logits of a chunk of a chip's rows, and of no more.
    largest = max(math.prod(r.shape) for r in found if WORDS_SPLIT // 2 in r.shape)
    assert largest <= BATCH // 4 * 7 * WORDS_SPLIT // 2


def test_a_step_without_constraints_is_noticed(monkeypatch):
    """The check of this file fails on the program that the compiler makes by itself."""
    monkeypatch.setattr(jax.lax, "with_sharding_constraint", lambda x, spec: x)
    with pytest.raises(AssertionError):
        test_no_device_holds_more_than_its_share("dinov2", "8x1")
