"""What the frozen `scenes-clip` knows of overlooked objects when it is given where they are.

python tests/bench/give_ceilings.py [--backbone=scenes-clip] [--size=48] [--scenes=8000]

Two ways to tell it, both scored as the AUC of present against absent names on overlooked objects:
a crop of the object, enlarged to the whole image, by its cosine with the name; and the one patch at
the object's centre, from which a ridge regression on scenes of four artists guesses the name's
embedding. Both for new scenes of those artists and of the one that never trained.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from PIL import Image

from perception_jax.api import Loaded, load_backbone
from perception_jax.data.records import Record
from perception_jax.data.scenes import objects as scenes
from perception_jax.data.scenes.sample import SceneConfig
from perception_jax.data.scenes.source import ScenesSource
from perception_jax.evals.linear_probe import ridge
from perception_jax.evals.ranking import area_under_curve, unit_rows
from perception_jax.nn import stack
from perception_jax.nn.taps import Taps
from perception_jax.ops.image import normalise
from perception_jax.ops.losses import unit

OBJECTS, SIDES = (2, 3), (0.3, 0.7)
"""As in `configs/give/scenes.py`: things in a scene, their sides."""
STEP = 250
MARGIN = 1.15
"""Side of a crop, in longer sides of the object's box."""
NEGATIVES = 30
TESTED = {"artists of training": ("train", 40_000), "unseen artist": ("test", 31_000)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Things:
    """All objects of some scenes. Letters: n objects, L layers, D width.

    Attributes:
      name: place in the table of names.
      overlooked: not the largest of its scene.
      absent: `NEGATIVES` names that are not in its scene.
      crop: the embedding of the object alone.
      patch: the token at its centre, after no block, one, and so on.
    """

    name: Int[np.ndarray, " n"]
    overlooked: np.ndarray
    absent: Int[np.ndarray, "n a"]
    crop: Float[np.ndarray, "n E"]
    patch: Float[np.ndarray, "n L D"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="scenes-clip")
    parser.add_argument("--size", type=int, default=48, help="side of the scenes in pixels")
    parser.add_argument("--scenes", type=int, default=8000, help="that the regression learns from")
    parser.add_argument("--tested", type=int, default=400)
    given = parser.parse_args()
    names = scenes.names()
    look = Looking(load_backbone(given.backbone).at_size(given.size), names)
    learned = look.at("train", seed=1, count=given.scenes)
    for title, (split, seed) in TESTED.items():
        shown = look.at(split, seed=seed, count=given.tested)
        print(f"{title}: {shown.overlooked.sum()} overlooked objects among {len(names)} names")
        print(f"  a crop of the object            AUC {auc(shown.crop @ look.texts.T, shown):.3f}")
        for layer in range(learned.patch.shape[1]):
            guess = ridge(learned.patch[:, layer], look.centred[learned.name])
            scores = unit_rows(guess(shown.patch[:, layer]), "guesses") @ look.directions.T
            print(f"  the patch after {layer} blocks        AUC {auc(scores, shown):.3f}")


class Looking:
    """The backbone, and its embedding of each name."""

    def __init__(self, backbone: Loaded, names: tuple[str, ...]):
        self.backbone, self.names = backbone, names
        self.size = backbone.processor.image.size
        self.place = {name: number for number, name in enumerate(names)}
        texts = backbone.processor.tokenizer([f"the {name}" for name in names]).ids
        text = jax.jit(lambda model, ids: unit(model.text(ids).embedding))
        self.texts = np.asarray(text(backbone.model, texts))
        self.centred = self.texts - self.texts.mean(axis=0)
        self.directions = unit_rows(self.centred, "names")
        layers = range(stack.depth_of(backbone.model.vision.blocks) + 1)
        taps = Taps(hidden=tuple(layers))
        self._hidden = jax.jit(lambda model, pixels: model.vision(pixels, taps=taps).hidden)
        self._embed = jax.jit(lambda model, pixels: unit(model.vision(pixels).embedding))

    def at(self, split: str, *, seed: int, count: int) -> Things:
        """The objects of `count` scenes of a split's artists."""
        config = SceneConfig(
            canvas=self.size,
            split=split,
            count=OBJECTS,
            size=SIDES,
            names=self.names,
            repeat=0.0,
            text=0.0,
            language="none",
        )
        source, rng = ScenesSource(config, seed=seed, length=count), np.random.default_rng(seed)
        parts = [self._step(records, rng) for records in steps(source)]
        columns = [field.name for field in dataclasses.fields(Things)]
        return Things(
            **{name: np.concatenate([getattr(one, name) for one in parts]) for name in columns}
        )

    def _step(self, records: list[Record], rng: np.random.Generator) -> Things:
        given = self._given([np.asarray(record.image) for record in records])
        hidden = np.stack([np.asarray(h) for h in self._hidden(*given)], axis=2)
        grid = round((hidden.shape[1] - 1) ** 0.5)
        rows = []
        for number, record in enumerate(records):
            shown = [self.place[thing.name] for thing in record.objects]
            free = np.setdiff1d(np.arange(len(self.names)), shown)
            areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (o.box for o in record.objects)]
            for thing, name, area in zip(record.objects, shown, areas, strict=True):
                absent = rng.choice(free, NEGATIVES, replace=False)
                token = hidden[number, 1 + centre_patch(thing.box, grid, self.size)]
                rows.append((name, area < max(areas), absent, token, self._crop(record, thing.box)))
        name, overlooked, absent, patch, crops = map(np.stack, zip(*rows, strict=True))
        return Things(
            name=name,
            overlooked=overlooked,
            absent=absent,
            patch=patch,
            crop=np.asarray(self._embed(*self._given(crops))),
        )

    def _crop(self, record: Record, box: tuple[float, ...]) -> np.ndarray:
        """A square around the box, as large as the image; black beyond its border."""
        x0, y0, x1, y1 = box
        half = max(x1 - x0, y1 - y0) * MARGIN / 2
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        window = tuple(round(v) for v in (x - half, y - half, x + half, y + half))
        whole = Image.fromarray(np.asarray(record.image)).crop(window)
        return np.asarray(whole.resize((self.size, self.size), Image.Resampling.BICUBIC))

    def _given(self, images: Sequence[np.ndarray]) -> tuple[nnx.Module, Array]:
        """The backbone and what it is shown."""
        image = self.backbone.processor.image
        pixels = normalise(jnp.asarray(np.stack(images)), image.mean, image.std, jnp.float32)
        return self.backbone.model, pixels


def steps(source: ScenesSource) -> Iterator[list[Record]]:
    for start in range(0, len(source), STEP):
        yield [source[k] for k in range(start, min(start + STEP, len(source)))]


def centre_patch(box: tuple[float, ...], grid: int, size: int) -> int:
    """Number of the patch, row by row, in which the middle of the box lies."""
    column, row = ((box[k] + box[k + 2]) / 2 * grid / size for k in (0, 1))
    return min(grid - 1, int(row)) * grid + min(grid - 1, int(column))


def auc(scores: Float[np.ndarray, "n C"], things: Things) -> float:
    """Present against absent names, over the overlooked objects."""
    chosen = np.flatnonzero(things.overlooked)
    absent = scores[chosen[:, None], things.absent[chosen]]
    return area_under_curve(scores[chosen, things.name[chosen]], absent.ravel())


if __name__ == "__main__":
    main()
