"""TensorFlow Datasets without TensorFlow: records from what `tfds.data_source` gives.

    import tensorflow_datasets as tfds

    keep_encoded = {"image": tfds.decode.SkipDecoding()}     # decoding is the loader's work
    data = tfds.data_source("my_set", split="train", decoders=keep_encoded)
    source = TfdsSource(data, FeatureMap.of(data, captions="caption"))

The set must be prepared as array_record, by a builder that yields encoded images (bytes or file
objects); those that yield arrays need TensorFlow once, to be prepared.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from perception_jax.data import images, records
from perception_jax.data.sources import fields, names, sizes
from perception_jax.data.sources.fields import Outside
from perception_jax.errors import DataError, did_you_mean

_TRIED = 8
"""Examples of which one must become a record when a source is made."""

Example = Mapping[str, Any]
"""One example of a data source: nested mappings of bytes, arrays and lists."""


class TfdsSource:
    """Random access to a data source of TFDS.

    Args:
      data: what `tfds.data_source` returns; picklable, with `len`, `[index]` and `dataset_info`.
      to_record: makes a record of an example and its number; a `FeatureMap`, or a picklable
        function for sets that need more.

    Raises:
      DataError: none of the first examples becomes a record.
    """

    def __init__(self, data: Any, to_record: Callable[[Example, int], records.Record]):
        self._data, self._to_record = data, to_record
        first = None
        for index in range(min(_TRIED, len(data))):
            try:
                self[index]
                return
            except DataError as error:
                first = first or error
        if first is not None:
            raise first

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> records.Record:
        """A record.

        Raises:
          DataError: the example is damaged, or does not become a record.
        """
        fields.check_index(index, len(self))
        try:
            example = self._data[index]
        except Exception as error:  # a damaged file raises whatever its reader or decoder does
            raise DataError(
                f"example {index}: cannot be read, most likely damaged ({type(error).__name__}: "
                f"{str(error)[:200]}). Prepare the set again."
            ) from error
        return self._to_record(example, index)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FeatureMap:
    """Names of the features of a record's parts; nested names are joined by "/".

    Attributes:
      image: an `Image`, encoded or decoded.
      captions: a `Text` or a sequence of them.
      boxes: a sequence of `BBoxFeature` (fractions: ymin, xmin, ymax, xmax).
      labels: a sequence of `ClassLabel`, one for each box.
      label_names: names of the labels' numbers.
      id: a `Text` or a number; None for the example's number.
      outside: what to do with boxes that leave their image or have no area.
    """

    image: str = "image"
    captions: str | None = None
    boxes: str | None = None
    labels: str | None = None
    label_names: Sequence[str] = ()
    id: str | None = None
    outside: Outside = "error"

    @classmethod
    def of(cls, data: Any, **features: str) -> FeatureMap:
        """A map for this data source: checks that the features exist, and finds the label names.

        Raises:
          DataError: an unknown feature (naming the nearest), or only one of boxes and labels.
        """
        mapped = cls(**features)
        known = _flat(data.dataset_info.features)
        for name in (mapped.image, mapped.captions, mapped.boxes, mapped.labels, mapped.id):
            if name is not None and name not in known:
                raise DataError(
                    f"{data.dataset_info.name}: there is no feature {name!r}"
                    f"{did_you_mean(name, known)}"
                )
        if (mapped.boxes is None) != (mapped.labels is None):
            raise DataError(f"{data.dataset_info.name}: expected boxes and labels, or neither.")
        if mapped.labels is None:
            return mapped
        return dataclasses.replace(mapped, label_names=known[mapped.labels].names)

    def __call__(self, example: Example, index: int) -> records.Record:
        """The record of an example.

        Raises:
          DataError: a feature is not of the requested kind.
        """
        where = f"example {index}"
        name = str(index) if self.id is None else str(_plain(example, self.id, where))
        image = _value(example, self.image, where)
        if isinstance(image, np.ndarray) and image.ndim == 3:
            image = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
        elif not isinstance(image, bytes):
            raise fields.fail(f"{where}: {self.image}", "an image", type(image).__name__)
        captions = () if self.captions is None else _plain(example, self.captions, where)
        captions = [captions] if isinstance(captions, str) else captions
        if not all(isinstance(text, str) for text in captions):
            raise fields.fail(f"{where}: {self.captions}", "texts", captions)
        size, objects = self._objects(example, image, where)
        return records.Record(
            id=name,
            images=(image,),
            size=size,
            captions=tuple(text for text in captions if text),
            objects=objects,
        )

    def _objects(
        self, example: Example, image: bytes | np.ndarray, where: str
    ) -> tuple[tuple[int, int] | None, tuple[records.ObjectAnnotation, ...]]:
        """The size of the picture as shown, if its objects needed it, and the objects."""
        if self.boxes is None or self.labels is None:
            return None, ()
        corners = np.array(_value(example, self.boxes, where), np.float64)
        labels = np.array(_value(example, self.labels, where), np.int64).tolist()
        if not labels and not corners.size:
            return None, ()
        if corners.shape != (len(labels), 4):
            raise fields.fail(
                f"{where}: {self.boxes}", f"{len(labels)} boxes, one a label", corners.shape
            )
        # Fractions of the stored pixels: TFDS ignores EXIF when it decodes.
        header = images.read_header(image, name=where)
        frame = sizes.Frame(header.shown, header)
        width, height = header.stored
        boxes = (corners[:, [1, 0, 3, 2]] * [width, height, width, height]).tolist()
        raw = tuple(self.label_names)
        objects = []
        for k, (box, label) in enumerate(zip(boxes, labels, strict=True)):
            if not 0 <= label < len(raw):
                raise fields.fail(
                    f"{where}: {self.labels}[{k}]", f"a label below {len(raw)}", label
                )
            place = f"{where}: {self.boxes}[{k}]"
            box = fields.fit_box(
                fields.numbers(4)(box, place), (width, height), self.outside, place
            )
            if box is not None:
                name, own = _display_names(raw)[label], raw[label]
                objects.append(
                    records.ObjectAnnotation(
                        name=name, raw_name=own, box=frame.box(box), category_id=label
                    )
                )
        return frame.size, tuple(objects)


@functools.lru_cache(maxsize=16)
def _display_names(raw: tuple[str, ...]) -> dict[int, str]:
    return names.display_names(dict(enumerate(raw)))


def _plain(example: Example, name: str, where: str) -> Any:
    """A feature with texts for bytes."""
    value = _value(example, name, where)
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8")
        if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str):
            return [one.decode("utf-8") if isinstance(one, bytes) else one for one in value]
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {name}: expected UTF-8 text ({error}).") from None
    return value


def _value(example: Example, name: str, where: str) -> Any:
    """The value of a feature; a name with a slash may be a key itself or a path."""
    inner, rest = example, name
    while isinstance(inner, Mapping):
        if rest in inner:
            return inner[rest]
        first, _, rest = rest.partition("/")
        inner = inner.get(first)
    raise DataError(f"{where}: there is no feature {name!r}.")


@runtime_checkable
class _Named(Protocol):
    """Features by name, as TFDS's `FeaturesDict`."""

    def keys(self) -> Iterable[str]:
        """The names."""

    def __iter__(self) -> Iterator[str]: ...

    def __getitem__(self, name: str) -> Any: ...


@runtime_checkable
class _Repeated(Protocol):
    """A sequence of equal features, as TFDS's `Sequence`."""

    @property
    def feature(self) -> Any:
        """What is repeated."""


def _one(feature: Any) -> Any:
    return feature.feature if isinstance(feature, _Repeated) else feature


def _flat(features: _Named, prefix: str = "") -> dict[str, Any]:
    """All features by name, those inside others included."""
    found = {}
    for key in features:
        inner = _one(features[key])
        found[prefix + key] = inner
        if isinstance(inner, _Named):
            found |= _flat(inner, f"{prefix}{key}/")
    return found
