"""OverlookedShapes: a toy benchmark of objects that a backbone overlooks, for GiVE.

Each scene has one large shape in its middle and two small ones in corners. A tiny CLIP learns the
large shape's caption only and is frozen; adapters then have to bring out whichever shape the
instruction names. Minutes on a laptop, so that the whole method can be tried before it costs a day.

Letters: n scenes, S side, M rows of a batch, C = 10 shapes, K = 6 colours, E embedding width.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from perception_jax.data.object_index import index_objects
from perception_jax.data.records import ObjectAnnotation, Record
from perception_jax.evals.ranking import area_under_curve
from perception_jax.models.clip.config import VisionConfig
from perception_jax.models.clip.modeling import ClipVisionTower
from perception_jax.nn import stack
from perception_jax.nn.adapters import AdapterParam
from perception_jax.nn.text_tower import TextConfig, TextTower
from perception_jax.nn.towers import TowerOutput
from perception_jax.ops.losses import softmax_contrastive, unit
from perception_jax.systems.give.adapter import AdapterConfig, InstructionFeatures
from perception_jax.systems.give.encode import take_rows
from perception_jax.systems.give.losses import LossConfig, RowLabels, all_losses
from perception_jax.systems.give.model import Give, GiveConfig
from perception_jax.systems.give.sampler import BatchPlanner, GroupConfig

SIDE, LARGE, SMALL = 32, 16, 7
"""Sides of an image, of a large and of a small shape, pixels."""
CORNERS = ((1, 1), (1, 24), (24, 1), (24, 24))
"""Top left corners of the small shapes."""
COLOURS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 1.0, 0.1),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (1.0, 1.0, 0.1),
    "magenta": (1.0, 0.1, 1.0),
    "cyan": (0.1, 1.0, 1.0),
}
"""Colours by name."""
MEAN = DEVIATION = 0.3
"""Mean and standard deviation of the image normalisation."""
BLANK = -0.5
"""Value of a blank image, normalised."""

WIDTH, HEADS = 48, 4
"""Width and heads of the backbone."""
PRETRAINING_STEPS, PRETRAINING_BATCH = 700, 96
"""Steps and batch size of the backbone's training."""
STEPS, GROUPS = 3500, GroupConfig(groups=8, images=6)
"""Steps and batches of the adapters' training."""
LEARNING_RATE = 2e-3
"""Learning rate of the adapters' training."""
LEAST_SCALE = 20.0
"""Smallest inverse temperature of OITC."""

QUERIES = 300
"""Number of query scenes in image-image retrieval."""

Axis = Float[np.ndarray, "#S #S"]
"""Coordinates along an axis."""
Shape = Callable[[Axis, Axis], Bool[np.ndarray, "S S"]]
"""Function from coordinates to the pixels of a shape."""
SHAPES: dict[str, Shape] = {
    "disc": lambda u, w: np.hypot(u, w) < 0.95,
    "square": lambda u, w: (abs(u) < 0.85) & (abs(w) < 0.85),
    "triangle": lambda u, w: (w > -0.9) & (abs(u) < 0.95 * (w + 1) / 2),
    "plus": lambda u, w: (abs(u) < 0.3) | (abs(w) < 0.3),
    "diamond": lambda u, w: abs(u) + abs(w) < 0.95,
    "ring": lambda u, w: (np.hypot(u, w) > 0.5) & (np.hypot(u, w) < 0.95),
    "cross": lambda u, w: (abs(u - w) < 0.45) | (abs(u + w) < 0.45),
    "bar": lambda u, w: (abs(w) < 0.35) & (abs(u) <= 1),
    "post": lambda u, w: (abs(u) < 0.35) & (abs(w) <= 1),
    "funnel": lambda u, w: (w < 0.9) & (abs(u) < 0.95 * (1 - w) / 2),
}
"""Shapes by name, in coordinates of pixel centres from -1 to 1."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenes:
    """Scenes with one large and two small shapes.

    Attributes:
      pixels: normalised.
      shape, colour: of each scene's three objects, the large one first. All shapes differ.
    """

    pixels: Float32[np.ndarray, "n 32 32 3"]
    shape: Int[np.ndarray, "n 3"]
    colour: Int[np.ndarray, "n 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores on test scenes; shares and areas under curves are in [0, 1].

    Attributes:
      caption_salient, caption_overlooked: the right one of all 60 captions comes first.
      presence_oid, presence_cosine: area under the curve, overlooked shapes against absent ones.
      cosine_present, cosine_absent, cosine_blank: mean, with the shape's mean caption.
      image_image: another scene with the named shape comes first.
    """

    caption_salient: float
    caption_overlooked: float
    presence_oid: float
    presence_cosine: float
    cosine_present: float
    cosine_absent: float
    cosine_blank: float
    image_image: float


def draw(count: int, seed: int) -> Scenes:
    """Draws noise, a large shape near the centre, and small ones in two corners."""
    rng = np.random.default_rng(seed)
    shape = rng.permuted(np.tile(np.arange(len(SHAPES)), (count, 1)), axis=1)[:, :3]
    colour = rng.integers(len(COLOURS), size=(count, 3))
    corner = rng.permuted(np.tile(np.arange(4), (count, 1)), axis=1)[:, :2]
    places = np.concatenate(
        [rng.integers(7, 10, (count, 1, 2)), np.asarray(CORNERS)[corner]], axis=1
    )
    pixels = rng.uniform(0.0, 0.25, (count, SIDE, SIDE, 3)).astype(np.float32)
    colours = np.asarray(list(COLOURS.values()), np.float32)
    masks = {side: [mask(name, side) for name in SHAPES] for side in (LARGE, SMALL)}
    for k, side in enumerate((LARGE, SMALL, SMALL)):
        for image, kind, paint, (top, left) in zip(
            pixels, shape[:, k], colours[colour[:, k]], places[:, k], strict=True
        ):
            image[top : top + side, left : left + side][masks[side][kind]] = paint
    return Scenes(pixels=(pixels - MEAN) / DEVIATION, shape=shape, colour=colour)


def mask(name: str, side: int) -> Bool[np.ndarray, "S S"]:
    """The pixels of a shape in a square of that side."""
    centres = (2 * np.arange(side) + 1) / side - 1
    return SHAPES[name](centres[None, :], centres[:, None])


class MeanText(TextTower):
    """A text tower without a mask that returns the mean of its tokens."""

    def __call__(self, ids: Int[Array, "B T"]) -> TowerOutput:
        """Encodes token ids, all of which count."""
        x = self.token_embedding[...][ids] + self.position_embedding[...][: ids.shape[1]]
        tokens = self.norm_final(stack.run(self.blocks, x).x)
        pooled = tokens.mean(axis=1)
        return TowerOutput(embedding=self.projection(pooled), pooled=pooled, tokens=tokens)


class NoNorm(nnx.Module):
    """Replaces a norm."""

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the tokens unchanged."""
        return x


class ShapesBackbone(nnx.Module):
    """A tiny ViT with texts [start, colour, shape] or [start, shape]."""

    def __init__(self, *, rngs: nnx.Rngs):
        size = {"width": WIDTH, "heads": HEADS, "mlp_dim": 4 * WIDTH, "act": "gelu"}
        vision = VisionConfig(image_size=SIDE, patch_size=8, depth=3, **size)
        words = 1 + len(COLOURS) + len(SHAPES)
        text = TextConfig(vocab_size=words, context=3, depth=1, **size)
        self.vision = ClipVisionTower(vision, WIDTH, rngs=rngs)
        # CLIP's norm before the blocks would make all patches, bright or dark, equally long.
        self.vision.norm_pre = NoNorm()
        self.text = MeanText(text, WIDTH, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(1 / 0.07)))

    def captions(self) -> Float[Array, "C K E"]:
        """Unit embeddings of all captions, by shape and colour."""
        shape, colour = np.mgrid[: len(SHAPES), : len(COLOURS)]
        ids = np.stack([np.zeros_like(shape), 1 + colour, _word(shape)], axis=-1).reshape(-1, 3)
        return unit(self.text(jnp.asarray(ids)).embedding).reshape(*shape.shape, -1)

    def instructions(self) -> InstructionFeatures:
        """All of them, by shape."""
        shape = np.arange(len(SHAPES))
        out = self.text(jnp.asarray(np.stack([np.zeros_like(shape), _word(shape)], axis=1)))
        return InstructionFeatures(
            states=out.tokens,
            mask=jnp.ones(out.tokens.shape[:2], bool),
            embedding=unit(out.embedding),
            strength=jnp.float32(1.0),
        )


def _word(shape: Int[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
    return 1 + len(COLOURS) + shape


def pretrained(scenes: Scenes, *, steps: int = PRETRAINING_STEPS, seed: int = 0) -> ShapesBackbone:
    """Trains a backbone on captions of the large shapes only."""
    model = jax.jit(lambda: ShapesBackbone(rngs=nnx.Rngs(params=seed)))()
    pixels = jnp.asarray(scenes.pixels)
    rng = np.random.default_rng([seed, 1])
    picked = rng.integers(len(pixels), size=(steps, PRETRAINING_BATCH))
    batches = ((row, scenes.shape[row, 0], scenes.colour[row, 0]) for row in picked)

    def loss(model: ShapesBackbone, batch: Any, pixels: Array) -> Array:
        image, shape, colour = batch
        embedding = unit(model.vision(pixels[image]).embedding)
        return softmax_contrastive(
            embedding, model.captions()[shape, colour], jnp.exp(model.logit_scale[...])
        )

    return _fit(model, nnx.Param, loss, batches, steps, pixels)


def with_adapters(backbone: ShapesBackbone, *, seed: int = 0, **adapter: Any) -> Give:
    """Adds fresh adapters with heads of 12 to all three blocks."""
    config = GiveConfig(layers="all", adapter=AdapterConfig(heads=HEADS, **adapter))
    backbone = jax.tree.map(lambda leaf: leaf, backbone)
    return Give(config, backbone, rngs=nnx.Rngs(params=seed))


def trained(
    give: Give,
    scenes: Scenes,
    *,
    steps: int = STEPS,
    seed: int = 0,
    losses: LossConfig | None = None,
) -> Give:
    """Trains the adapters with GiVE's losses and sampling; the backbone stays frozen."""
    config = LossConfig() if losses is None else losses
    pixels = jnp.asarray(scenes.pixels)

    def loss(give: Give, batch: dict[str, Array], pixels: Array) -> Array:
        backbone = give.backbone
        kinds = jnp.stack([batch["label"], batch["absent_index"]], axis=1).reshape(-1)
        instruction = take_rows(backbone.instructions(), kinds)
        out = give(pixels[batch["image_index"]], instruction, repeats=2)
        return all_losses(
            config,
            RowLabels(
                image=batch["image_index"],
                label=batch["label"],
                caption=batch["caption_index"],
            ),
            present=out.embedding[::2],
            absent=out.embedding[1::2],
            text=backbone.captions().reshape(-1, WIDTH)[batch["caption_index"]],
            present_logit=out.presence_logit[::2],
            absent_logit=out.presence_logit[1::2],
            scale=jnp.maximum(jnp.exp(backbone.logit_scale[...]), LEAST_SCALE),
        ).total

    return _fit(give, AdapterParam, loss, batches(scenes, steps, seed), steps, pixels)


def batches(scenes: Scenes, steps: int, seed: int) -> Iterator[dict[str, Int32[np.ndarray, " M"]]]:
    """Groups of one shape, with another shape and an absent one, as GiVE's sampler draws them."""
    config = dataclasses.replace(GROUPS, seed=seed)
    planner = BatchPlanner(index_objects(records(scenes)), config)
    for step in range(steps):
        plan = planner.plan(0, step)  # of the first epoch: absent shapes are uniform
        colour = scenes.colour[plan.record, plan["object"]]
        yield {
            "image_index": plan.record,
            "label": plan["label"],
            "absent_index": plan["absent_index"],
            "caption_index": (plan["label"] * len(COLOURS) + colour).astype(np.int32),
        }


def records(scenes: Scenes) -> list[Record]:
    """Records of the scenes, without their pixels."""
    colours, shapes = list(COLOURS), list(SHAPES)
    nothing = np.zeros((1, 1, 3), np.uint8)

    def one(shape: int, colour: int) -> ObjectAnnotation:
        name = shapes[shape]
        caption = f"{colours[colour]} {name}"
        return ObjectAnnotation(name=name, box=None, captions=(caption,), category_id=shape)

    return [
        Record(id=str(k), images=(nothing,), objects=tuple(map(one, shape, colour)))
        for k, (shape, colour) in enumerate(
            zip(scenes.shape.tolist(), scenes.colour.tolist(), strict=True)
        )
    ]


def measured(give: Give, scenes: Scenes) -> Scores:
    """Scores every scene with every instruction."""
    captions = np.asarray(give.backbone.captions())
    embedding, presence = _under_all(give, scenes.pixels)
    blank, _ = _under_all(give, np.full((1, SIDE, SIDE, 3), BLANK, np.float32))
    scene = np.arange(len(scenes.shape))

    def caption(place: int) -> float:
        shape, colour = scenes.shape[:, place], scenes.colour[:, place]
        logits = embedding[scene, shape] @ captions.reshape(-1, WIDTH).T
        return float((logits.argmax(axis=1) == shape * len(COLOURS) + colour).mean())

    mean = captions.mean(axis=1)
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
    cosine = (embedding * mean).sum(axis=-1)
    shown = np.zeros(cosine.shape, bool)
    np.put_along_axis(shown, scenes.shape, True, axis=1)
    overlooked = scene[:, None], scenes.shape[:, 1:]
    return Scores(
        caption_salient=caption(0),
        caption_overlooked=caption(1),
        presence_oid=area_under_curve(presence[overlooked].ravel(), presence[~shown]),
        presence_cosine=area_under_curve(cosine[overlooked].ravel(), cosine[~shown]),
        cosine_present=float(cosine[shown].mean()),
        cosine_absent=float(cosine[~shown].mean()),
        cosine_blank=float((blank[0] * mean).sum(axis=-1).mean()),
        image_image=_image_image(embedding, scenes.shape[:, 1], shown),
    )


def static_captions(backbone: ShapesBackbone, scenes: Scenes) -> tuple[float, float]:
    """Share of scenes for which the backbone alone ranks a caption of the large, of a small shape
    first."""
    captions = np.asarray(backbone.captions()).reshape(-1, WIDTH)
    run = jax.jit(lambda model, pixels: model.vision(pixels).embedding)
    best = (np.asarray(run(backbone, scenes.pixels)) @ captions.T).argmax(axis=1)
    right = best[:, None] == scenes.shape * len(COLOURS) + scenes.colour
    return float(right[:, 0].mean()), float(right[:, 1].mean())


def _image_image(
    embedding: Float[np.ndarray, "n C E"],
    named: Int[np.ndarray, " n"],
    shown: Bool[np.ndarray, "n C"],
) -> float:
    """Share of the first scenes whose nearest other scene, under the same shape, has it too."""
    found = []
    for query in range(min(QUERIES, len(embedding))):
        kind = named[query]
        cosine = embedding[:, kind] @ embedding[query, kind]
        cosine[query] = -np.inf
        found.append(shown[cosine.argmax(), kind])
    return float(np.mean(found))


def _under_all(
    give: Give, pixels: Float32[np.ndarray, "n 32 32 3"], size: int = 100
) -> tuple[Float32[np.ndarray, "n C E"], Float32[np.ndarray, "n C"]]:
    """Embeddings and presence logits under every instruction."""

    @jax.jit
    def run(give: Give, pixels: Array) -> tuple[Array, Array]:
        kinds = jnp.tile(jnp.arange(len(SHAPES)), len(pixels))
        instruction = take_rows(give.backbone.instructions(), kinds)
        out = give(pixels, instruction, repeats=len(SHAPES))
        return out.embedding, out.presence_logit

    done = [run(give, pixels[start : start + size]) for start in range(0, len(pixels), size)]
    embedding, presence = (np.concatenate(parts) for parts in zip(*done, strict=True))
    return embedding.reshape(len(pixels), len(SHAPES), -1), presence.reshape(len(pixels), -1)


def _fit(
    model: Any,
    trainable: Any,
    loss: Callable[[Any, Any, Array], Array],
    batches: Iterator[Any],
    steps: int,
    pixels: Array,
) -> Any:
    """AdamW under a one-cycle schedule on what the filter names; clip and moments as for images."""
    graph, trained, frozen = nnx.split(model, trainable, ...)
    rate = optax.cosine_onecycle_schedule(steps, LEARNING_RATE)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.98, eps=1e-6)
    )

    @jax.jit
    def step(trained: Any, state: Any, frozen: Any, batch: Any, pixels: Array) -> Any:
        def score(trained: Any) -> Array:
            return loss(nnx.merge(graph, trained, frozen), batch, pixels)

        value, gradient = jax.value_and_grad(score)(trained)
        updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    state = jax.jit(optimizer.init)(trained)
    for number, batch in enumerate(batches, start=1):
        trained, state, value = step(trained, state, frozen, batch, pixels)
        if number % 100 == 0 or number == steps:
            _log.info("step %d of %d: loss %.4f", number, steps, float(value))
    return nnx.merge(graph, trained, frozen)
