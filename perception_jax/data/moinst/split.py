"""Stratified split into training and test images."""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping, Sequence

from perception_jax.data.moinst.lvis import draw
from perception_jax.data.moinst.record import MoinstImage
from perception_jax.errors import ConfigError

TEST_IMAGES = 1100
"""Number of test images in the published split."""


def stratified_split(
    images: Sequence[MoinstImage], test: int = TEST_IMAGES, *, seed: int = 0
) -> tuple[tuple[MoinstImage, ...], tuple[MoinstImage, ...]]:
    """Train and test images, both in the given order; no image is in both.

    Each class's aim is the same share of its objects as of all images. In each round the class
    that lacks most of its aim takes a random one of its images (`lvis.draw`); one with a class that
    has reached its aim only if there is no other.

    Args:
      test: images of the test part.

    Raises:
      ConfigError: not fewer test images than there are images.
    """
    if not 0 < test < len(images):
        raise ConfigError(
            f"test images: expected more than 0 and fewer than the {len(images)} images, found "
            f"{test}."
        )
    kinds = [[one.class_id for one in image.objects] for image in images]
    order = [draw(seed, "test", image.image_id) for image in images]
    queues: dict[int, list[int]] = collections.defaultdict(list)
    for k in sorted(range(len(images)), key=order.__getitem__, reverse=True):
        for kind in set(kinds[k]):
            queues[kind].append(k)
    counts = collections.Counter(kind for image in kinds for kind in image)
    lacking = {kind: count * test / len(images) for kind, count in counts.items()}
    put_off: dict[int, list[int]] = collections.defaultdict(list)
    chosen: set[int] = set()
    while len(chosen) < test:
        kind = max(lacking, key=lambda number: (lacking[number], -number))
        image = _take(queues[kind], put_off[kind], chosen, kinds, lacking)
        if image is None:
            del lacking[kind]
            continue
        chosen.add(image)
        for other in kinds[image]:
            if other in lacking:
                lacking[other] -= 1
    train = tuple(image for k, image in enumerate(images) if k not in chosen)
    return train, tuple(image for k, image in enumerate(images) if k in chosen)


def _take(
    queue: list[int],
    put_off: list[int],
    chosen: Collection[int],
    kinds: Sequence[Sequence[int]],
    lacking: Mapping[int, float],
) -> int | None:
    """The next image of a class, or None; those that would overfill a class are put off."""
    while queue:
        image = queue.pop()
        if image in chosen:
            continue
        if all(lacking.get(kind, 0.0) >= 0.5 for kind in kinds[image]):
            return image
        put_off.append(image)
    while put_off:
        image = put_off.pop(0)
        if image not in chosen:
            return image
    return None
