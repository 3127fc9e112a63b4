"""MOInst-R: images and objects selected from LVIS v1 to resemble MOInst, without captions.

The 264 most frequent classes, one object per class and image, 80,000 images that balance the
classes. "Random" is the order of SHA-256 of a seed and the ids, so that the choice depends on
neither the order of the file nor a library's generator.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from perception_jax.data.moinst.names import clean_name
from perception_jax.data.moinst.record import MoinstClass, MoinstImage, MoinstObject
from perception_jax.data.moinst.tables import parse_categories
from perception_jax.data.sources import fields
from perception_jax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RebuildConfig:
    """Settings of the selection of classes, images and objects from LVIS.

    Attributes:
      classes, images: how many are chosen, at most.
      objects: at most of one image.
      min_area_share: smaller boxes are dropped; share of the image's area.
      min_side: boxes with a shorter side are dropped; pixels.
      seed: of all that is random.
    """

    classes: int = 264
    images: int = 80_000
    objects: int = 3
    min_area_share: float = 0.001
    min_side: float = 12.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.classes, self.images, self.objects) < 1:
            raise ConfigError(f"expected at least 1 class, image and object, found {self}.")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """Records by ascending image id, without captions; the classes; and what was counted.

    `eligible`: images with at least two classes left. `excluded`: images left out on request.
    """

    images: tuple[MoinstImage, ...]
    classes: tuple[MoinstClass, ...]
    eligible: int
    excluded: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Box:
    """An annotation of one of the chosen classes; `class_id` is the LVIS id."""

    id: int
    class_id: int
    box: tuple[float, float, float, float]

    @property
    def area(self) -> float:
        return self.box[2] * self.box[3]


def rebuild(
    content: Mapping[str, Any],
    config: RebuildConfig,
    *,
    exclude: Collection[int] = (),
    where: str = "LVIS",
) -> Rebuilt:
    """Selects classes, objects and images.

    Args:
      content: an LVIS v1 file, parsed.
      exclude: ids of images that must not be chosen, e.g. LVIS's validation images.
      where: what to call the file in a message.

    Raises:
      DataError: not such a file, or no image can be chosen; naming the entry and the key.
    """
    for key in ("images", "annotations", "categories"):
        if not isinstance(fields.mapping(content, where).get(key), list):
            raise DataError(
                f"{where}: expected an LVIS file with lists 'images', 'annotations' and "
                f"'categories', found the keys {fields.keys_of(content)}."
            )
    classes = choose_classes(content["categories"], config.classes, where)
    ids = {one.source_category_id: one.class_id for one in classes}
    annotated = _boxes_by_image(content["annotations"], ids, where)
    entries = _by_id(content["images"], where)
    excluded = set(exclude) & entries.keys()
    kept, fixed = {}, {}
    for image_id, entry in entries.items():
        if image_id not in excluded:
            size = _size(entry, f"{where}: image {image_id}")
            kept[image_id] = _kept(annotated.get(image_id, ()), size, config)
            if len(kept[image_id]) >= 2:
                fixed[image_id] = _fix(kept[image_id], image_id, config)
    if not fixed:
        raise DataError(f"{where}: expected images with at least two classes left, found none.")
    chosen = balanced_images(
        {image_id: [one.class_id for one in boxes] for image_id, boxes in fixed.items()},
        config.images,
        config.seed,
    )
    images = (
        _record(
            entries[image_id],
            fixed[image_id],
            _largest(kept[image_id]),
            classes,
            {one.class_id for one in annotated[image_id]},
            f"{where}: image {image_id}",
        )
        for image_id in sorted(chosen)
    )
    return Rebuilt(
        images=tuple(images), classes=classes, eligible=len(fixed), excluded=len(excluded)
    )


def choose_classes(
    categories: Sequence[Any], count: int, where: str = "LVIS"
) -> tuple[MoinstClass, ...]:
    """Selects the categories that occur in most images, by ascending id.

    Names that several categories share once they are cleaned are left out: as an instruction such
    a name would be ambiguous.

    Raises:
      DataError: an entry without "id", "name" or "image_count".
    """
    counts, frequencies = {}, {}
    known = parse_categories(categories, f"{where}: categories")
    for k, number in enumerate(known):
        at = f"{where}: categories[{k}]"
        (counts[number],) = fields.values(categories[k], at, image_count=fields.integer)
        frequencies[number] = fields.optional(fields.text)(
            categories[k].get("frequency"), f"{at}: frequency"
        )
    shared = collections.Counter(clean_name(one.name) for one in known.values())
    clear = [number for number, one in known.items() if shared[clean_name(one.name)] == 1]
    chosen = sorted(sorted(clear, key=lambda number: (-counts[number], number))[:count])
    return tuple(
        MoinstClass(
            class_id=class_id,
            source_category_id=number,
            name=known[number].name,
            frequency=frequencies[number],
            synonyms=known[number].synonyms,
        )
        for class_id, number in enumerate(chosen)
    )


def balanced_images(kinds: Mapping[int, Collection[int]], count: int, seed: int) -> list[int]:
    """Selects images so that the class counts are as equal as possible.

    In each round the class with the fewest chosen objects (the smaller id if equal) takes a random
    one of its images that is not chosen yet; all objects of that image count.

    Args:
      kinds: by image id, the classes of its objects, each once.
      count: of images, at most.

    Returns:
      Image ids in the order of their choice.
    """
    queues: dict[int, list[int]] = collections.defaultdict(list)
    for image_id in sorted(kinds, key=lambda number: draw(seed, number), reverse=True):
        for class_id in kinds[image_id]:
            queues[class_id].append(image_id)
    counts = dict.fromkeys(queues, 0)
    heap = [(0, class_id) for class_id in queues]
    heapq.heapify(heap)
    chosen: dict[int, None] = {}
    while heap and len(chosen) < count:
        found, class_id = heapq.heappop(heap)
        if found != counts[class_id]:
            continue  # it has taken objects since this entry was made
        queue = queues[class_id]
        while queue and queue[-1] in chosen:
            queue.pop()
        if not queue:
            continue
        image_id = queue.pop()
        chosen[image_id] = None
        for other in kinds[image_id]:
            counts[other] += 1
            heapq.heappush(heap, (counts[other], other))
    return list(chosen)


def draw(seed: int, *parts: int | str) -> str:
    """A random number of a seed and ids, as hexadecimal text: ascending, it is a random order."""
    text = ":".join(str(part) for part in (seed, *parts))
    return hashlib.sha256(text.encode()).hexdigest()


def _by_id(images: Sequence[Any], where: str) -> dict[int, Mapping[str, Any]]:
    entries: dict[int, Mapping[str, Any]] = {}
    for k, entry in enumerate(images):
        image_id = fields.required(entry, "id", fields.integer, f"{where}: images[{k}]")
        if image_id in entries:
            raise DataError(f"{where}: images[{k}]: id: {image_id} is also that of another image.")
        entries[image_id] = entry
    return entries


def _boxes_by_image(
    annotations: Iterable[Any], ids: Mapping[Any, int], where: str
) -> dict[int, list[_Box]]:
    found: dict[int, list[_Box]] = {}
    for k, entry in enumerate(annotations):
        at = f"{where}: annotations[{k}]"
        class_id = ids.get(fields.required(entry, "category_id", fields.integer, at))
        if class_id is not None:
            box, own, image_id = fields.values(
                entry, at, bbox=fields.numbers(4), id=fields.integer, image_id=fields.integer
            )
            found.setdefault(image_id, []).append(_Box(own, class_id, box))
    return found


def _kept(boxes: Iterable[_Box], size: tuple[int, int], config: RebuildConfig) -> list[_Box]:
    """The largest box of each class, without those that are too small."""
    largest: dict[int, _Box] = {}
    for box in sorted(boxes, key=lambda one: (-one.area, one.id)):
        largest.setdefault(box.class_id, box)
    min_area = config.min_area_share * size[0] * size[1]
    return [
        box
        for box in largest.values()
        if box.area >= min_area and min(box.box[2:]) >= config.min_side
    ]


def _fix(boxes: Sequence[_Box], image_id: int, config: RebuildConfig) -> list[_Box]:
    """The objects of an image: the smallest one, then others at random."""
    smallest = min(boxes, key=lambda one: (one.area, one.id))
    others = (one for one in boxes if one is not smallest)
    others = sorted(others, key=lambda one: draw(config.seed, image_id, one.id))
    return [smallest, *others[: config.objects - 1]]


def _largest(boxes: Sequence[_Box]) -> _Box:
    return min(boxes, key=lambda one: (-one.area, one.id))


def _record(
    entry: Mapping[str, Any],
    boxes: Sequence[_Box],
    largest: _Box,
    classes: Sequence[MoinstClass],
    annotated: Collection[int],
    where: str,
) -> MoinstImage:
    by_source = {one.source_category_id: one.class_id for one in classes}

    def class_ids(key: str) -> set[int]:
        found = fields.list_of(fields.integer)(entry.get(key, []), f"{where}: {key}")
        return {by_source[number] for number in found if number in by_source}

    # What is in the image without being among its objects must never be taken for absent.
    unused = set(annotated) - {one.class_id for one in boxes}
    width, height = _size(entry, where)
    return MoinstImage(
        image_id=entry["id"],
        file=_file(entry, where),
        width=width,
        height=height,
        objects=tuple(
            MoinstObject(
                name=classes[one.class_id].name,
                class_id=one.class_id,
                source_category_id=classes[one.class_id].source_category_id,
                object_id=one.id,
                bbox=one.box,
                salient=one is largest,
            )
            for one in sorted(boxes, key=lambda one: one.id)
        ),
        neg_class_ids=tuple(sorted(class_ids("neg_category_ids"))),
        nonexhaustive_class_ids=tuple(sorted(class_ids("not_exhaustive_category_ids") | unused)),
    )


def _file(entry: Mapping[str, Any], where: str) -> str:
    return "/".join(fields.required(entry, "coco_url", fields.file_name, where).split("/")[-2:])


def _size(entry: Mapping[str, Any], where: str) -> tuple[int, int]:
    return fields.values(entry, where, width=fields.side, height=fields.side)
