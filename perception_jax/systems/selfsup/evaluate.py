"""What an image tower knows of scenes by an unseen artist, without training it further.

"concepts": which drawing of the training artists is nearest, by the tower's embedding. "probes":
linear probes that learned on the training artists' drawings; from the patch token at an object's
centre which way it faces and what colour it has, from the mean of all patch tokens on which side
and at what height it is. "pairs": in how many cases two augmented views of an image are more alike
than one of it and one of the other image of a minimal pair. Letters: B batch, S image side,
N images, P patches, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import MMVP_PATTERNS, ObjectAnnotation
from perception_jax.data.scenes.concepts import concepts
from perception_jax.data.scenes.pairs import BothImages, PairSource
from perception_jax.data.scenes.sample import SceneConfig
from perception_jax.data.scenes.source import ScenesSource, portrait
from perception_jax.data.scenes.spec import TEST_STYLE, TRAIN_STYLES
from perception_jax.evals.baselines import nearest_labels, nearest_pixel_top, pixel_features
from perception_jax.evals.linear_probe import probe_accuracy
from perception_jax.inference.batches import Batched
from perception_jax.ops.image import normalise
from perception_jax.ops.losses import unit
from perception_jax.systems.selfsup.data import TwoViews
from perception_jax.systems.selfsup.model import SelfSupervised

SEED = 50_000
"""Of the test images; training seeds never reach it."""
SIZES = (0.3, 0.6)
"""Sides of the objects of the probes, in sides of the image."""
WINDOWS = 6
"""Windows of raw pixels along a side, for the floors of the probes."""


def tower_of(model: nnx.Module) -> nnx.Module:
    """The image tower: of a training run, or the model itself."""
    return model.tower if isinstance(model, SelfSupervised) else model


class TowerFeatures:
    """Embeddings and patch tokens of images, compiled once per tower and mesh."""

    def __init__(self, processor: ImageProcessor, *, batch_size: int = 128):
        """Args: processor: of the tower; images come at its size."""

        def features(tower: nnx.Module, pixels: UInt8[Array, "B S S 3"]) -> dict[str, Array]:
            out = tower(normalise(pixels, processor.mean, processor.std))
            return {"embedding": unit(out.embedding), "patches": out.tokens[:, tower.prefix :]}

        self.processor = processor
        self._run = Batched(features, batch_size=batch_size)

    def __call__(
        self, model: nnx.Module, pixels: UInt8[np.ndarray, "N S S 3"], mesh: Mesh | None
    ) -> Mapping[str, Float[np.ndarray, "N ..."]]:
        """ "embedding" [N, D], of length 1, and "patches" [N, P, D]."""
        return self._run(tower_of(model), pixels, mesh)


class Concepts:
    """Recognises the unseen artist's portraits by the nearest ones of the training artists."""

    def __init__(self, features: TowerFeatures, *, names: int, per_name: int):
        """Args: names: of how many concepts; per_name: test portraits of each."""
        known = [concept.name for concept in concepts(held_out=False)][:names]
        size = features.processor.size
        self._features = features

        def drawn(styles: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
            shown = [
                portrait(name, style, size, SEED + k)
                for name in known
                for k, style in enumerate(styles)
            ]
            return np.stack(shown), np.repeat(np.arange(len(known)), len(styles))

        self._gallery, self._gallery_labels = drawn(TRAIN_STYLES)
        self._images, self._labels = drawn((TEST_STYLE,) * per_name)

    def __call__(self, model: nnx.Module, mesh: Mesh | None = None) -> dict[str, float]:
        """Rates of the right concept being nearest ("top1") or among the five nearest ("top5")."""
        gallery, queries = (
            self._features(model, pixels, mesh)["embedding"]
            for pixels in (self._gallery, self._images)
        )
        return self._rates(nearest_labels(gallery, self._gallery_labels, queries, k=5))

    def floors(self) -> dict[str, float]:
        """The same rates by shrunken pixels."""
        return self._rates(
            nearest_pixel_top(self._gallery, self._gallery_labels, self._images, k=5)
        )

    def _rates(self, best: np.ndarray) -> dict[str, float]:
        hit = best == self._labels[:, None]
        return {"top1": float(hit[:, 0].mean()), "top5": float(hit.any(axis=1).mean())}


class PairDiscrimination:
    """Tells the two images of minimal pairs by the unseen artist apart, by pattern."""

    def __init__(self, features: TowerFeatures, transform: TwoViews, *, per_pattern: int):
        """Args: transform: makes two views of both images of a record."""
        self._features, self._size = features, features.processor.size
        scenes = SceneConfig(canvas=self._size, split="test", language="none")
        length = per_pattern * len(MMVP_PATTERNS)
        source = BothImages(PairSource(scenes, seed=SEED, length=length))
        drawn = [transform(source[k], np.random.default_rng([SEED, k])) for k in range(length)]
        self._views = np.stack([(one["image"], one["second_image"]) for one in drawn])

    def __call__(self, model: nnx.Module, mesh: Mesh | None = None) -> dict[str, float]:
        """Rates of the right image being nearer: of all ("accuracy"), and by pattern."""
        return self._rates(self._features(model, self._pixels(), mesh)["embedding"])

    def floors(self) -> dict[str, float]:
        """The same rates by shrunken pixels, or 50 %, which is chance, if they are lower."""
        found = self._rates(pixel_features(self._pixels()))
        return {name: max(rate, 0.5) for name, rate in found.items()}

    def _pixels(self) -> UInt8[np.ndarray, "N S S 3"]:
        return self._views.reshape(-1, *self._views.shape[-3:])

    def _rates(self, embeddings: Float[np.ndarray, "N D"]) -> dict[str, float]:
        views = embeddings.reshape(len(self._views), 2, 2, -1)
        cosines = np.einsum("kad,kbd->kab", views[:, 0], views[:, 1])
        own, other = cosines[:, [0, 1], [0, 1]], cosines[:, [0, 1], [1, 0]]
        # Each view of each image looks for its own other view.
        right = ((own > other).mean(axis=1) + (own > other[:, ::-1]).mean(axis=1)) / 2
        rates = {"accuracy": float(right.mean())}
        for k, pattern in enumerate(MMVP_PATTERNS):
            rates[pattern] = float(right[k :: len(MMVP_PATTERNS)].mean())
        return rates


_Features = Mapping[str, Float[np.ndarray, "N _"]]
"""Of each image: "mean" is of all of it, "centre" of the place of its object."""


class Probes:
    """Linear probes of one object's direction, place and colour."""

    def __init__(self, features: TowerFeatures, *, learned: int, tested: int):
        """Args: learned, tested: images that the probes learn from, and are tested on."""
        self._features = features
        self._parts = {
            "train": _single_objects(features.processor.size, "train", learned),
            "test": _single_objects(features.processor.size, "test", tested),
        }

    def __call__(self, model: nnx.Module, mesh: Mesh | None = None) -> dict[str, float]:
        """The accuracy of each probe of `LABELS`."""
        return self._accuracies({part: self._tokens(model, part, mesh) for part in self._parts})

    def _accuracies(self, features: Mapping[str, _Features]) -> dict[str, float]:
        """Of linear probes of the features of both parts."""
        found = {}
        for name in LABELS:
            kind = "centre" if name in AT_CENTRE else "mean"
            given = []
            for part in ("train", "test"):
                rows, labels = self._labelled(part, name)
                given += [features[part][kind][rows], labels]
            found[name] = probe_accuracy(*given)
        return found

    def _tokens(self, model: nnx.Module, part: str, mesh: Mesh | None) -> _Features:
        """The mean patch token of each image, and the one at the centre of its object."""
        pixels, items = self._parts[part]
        patches = self._features(model, pixels, mesh)["patches"]
        grid, size = round(patches.shape[1] ** 0.5), pixels.shape[1]
        columns, rows = np.minimum((_middles(items) * grid / size).astype(int), grid - 1).T
        centre = patches[np.arange(len(patches)), rows * grid + columns]
        return {"mean": patches.mean(axis=1), "centre": centre}

    def floors(self) -> dict[str, float]:
        """The same by raw pixels (the image shrunk, and a window at the object's centre), or the
        share of the most frequent test label if that is higher."""
        floors = self._accuracies({part: self._pixels(part) for part in self._parts})
        for name in LABELS:
            _, labels = self._labelled("test", name)
            most = max(np.unique(labels, return_counts=True)[1]) / len(labels)
            floors[name] = max(floors[name], float(most))
        return floors

    def _pixels(self, part: str) -> _Features:
        pixels, items = self._parts[part]
        side = pixels.shape[1] // WINDOWS
        corners = np.clip(_middles(items).astype(int) - side // 2, 0, pixels.shape[1] - side)
        windows = [
            image[y : y + side, x : x + side] for image, (x, y) in zip(pixels, corners, strict=True)
        ]
        return {
            "mean": pixel_features(pixels, size=12),
            "centre": np.stack(windows).reshape(len(windows), -1) / 255,
        }

    def _labelled(self, part: str, name: str) -> tuple[list[int], list[str]]:
        """The images of which the question has an answer, and the answers."""
        answers = [LABELS[name](item) for item in self._parts[part][1]]
        rows = [k for k, answer in enumerate(answers) if answer is not None]
        return rows, [answers[k] for k in rows]


def _single_objects(size: int, split: str, count: int) -> tuple[np.ndarray, list[ObjectAnnotation]]:
    """Images of one object each, all of concepts that have a direction, and what is known of it."""
    directed = tuple(c.name for c in concepts(held_out=False) if c.facing != "front")
    config = SceneConfig(
        canvas=size,
        split=split,
        names=directed,
        count=(1, 1),
        size=SIZES,
        text=0.0,
        tint=0.5,
        language="none",
    )
    source = ScenesSource(config, seed=SEED, length=count)
    records = [source[k] for k in range(count)]
    return np.stack([record.image for record in records]), [one.objects[0] for one in records]


def _middles(items: Sequence[ObjectAnnotation]) -> Float[np.ndarray, "N 2"]:
    boxes = np.array([item.box for item in items])
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _attribute(name: str, item: ObjectAnnotation) -> str | None:
    return item.attributes.get(name)


def _side(options: tuple[str, str], item: ObjectAnnotation) -> str | None:
    words = item.attributes.get("position", "").split()
    return next((word for word in options if word in words), None)


LABELS: Mapping[str, Callable[[ObjectAnnotation], str | None]] = {
    "direction": functools.partial(_attribute, "facing"),
    "side": functools.partial(_side, ("left", "right")),
    "height": functools.partial(_side, ("top", "bottom")),
    "colour": functools.partial(_attribute, "colour"),
}
"""What each probe is asked of an object; None where there is no clear answer."""
AT_CENTRE = ("direction", "colour")
"""Probes of the patch token at the object's centre; the others see the mean of all."""
