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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from perception_jax.data import images, records
from perception_jax.data.sources import fields
from perception_jax.errors import DataError

Example = Mapping[str, Any]
"""One example of a data source: nested mappings of bytes, arrays and lists."""


class TfdsSource:
    """Random access to a data source of TFDS.

    Args:
      data: what `tfds.data_source` returns; picklable, with `len`, `[index]` and `dataset_info`.
      to_record: makes a record of an example and its number; a `FeatureMap`, or a picklable
        function for sets that need more.

    Raises:
      DataError: the first example does not become a record.
    """

    def __init__(self, data: Any, to_record: Callable[[Example, int], records.Record]):
        self._data, self._to_record = data, to_record
        if len(data):
            self._to_record(data[0], 0)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> records.Record:
        fields.check_index(index, len(self))
        return self._to_record(self._data[index], index)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FeatureMap:
    """Where the parts of a record are in an example; names of nested features are joined by "/".

    Attributes:
      image: an `Image`, encoded or decoded.
      captions: a `Text` or a sequence of them.
      boxes: a sequence of `BBoxFeature` (fractions: ymin, xmin, ymax, xmax).
      labels: a sequence of `ClassLabel`, one for each box.
      label_names: names of the labels' numbers.
      id: a `Text` or a number; None for the example's number.
    """

    image: str = "image"
    captions: str | None = None
    boxes: str | None = None
    labels: str | None = None
    label_names: Sequence[str] = ()
    id: str | None = None

    @classmethod
    def of(cls, data: Any, **features: str) -> FeatureMap:
        """A map for this data source: checks that the features exist, and finds the label names.

        Raises:
          DataError: an unknown feature (naming the nearest), or only one of boxes and labels.
        """
        mapped = cls(**features)
        info = data.dataset_info.features
        for name in (mapped.image, mapped.captions, mapped.boxes, mapped.labels, mapped.id):
            if name is not None and _feature(info, name) is None:
                raise DataError(
                    f"{data.dataset_info.name}: there is no feature {name!r}"
                    f"{fields.nearest(name, _flat_names(info))}"
                )
        if (mapped.boxes is None) != (mapped.labels is None):
            raise DataError(f"{data.dataset_info.name}: expected boxes and labels, or neither.")
        if mapped.labels is None:
            return mapped
        return dataclasses.replace(mapped, label_names=_feature(info, mapped.labels).names)

    def __call__(self, example: Example, index: int) -> records.Record:
        """The record of an example.

        Raises:
          DataError: a feature is not of the kind asked for.
        """
        name = str(index) if self.id is None else str(_plain(_value(example, self.id)))
        image = _value(example, self.image)
        if isinstance(image, np.ndarray):
            image = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
        elif not isinstance(image, bytes):
            raise fields.fail(f"example {index}: {self.image}", "an image", type(image).__name__)
        captions = () if self.captions is None else _value(example, self.captions)
        captions = [captions] if isinstance(captions, bytes | str) else captions
        return records.Record(
            id=name,
            image=image,
            captions=tuple(text for text in map(_plain, captions) if text),
            objects=self._objects(example, image, index),
        )

    def _objects(
        self, example: Example, image: bytes | np.ndarray, index: int
    ) -> tuple[records.ObjectAnnotation, ...]:
        if self.boxes is None or self.labels is None:
            return ()
        corners = np.array(_value(example, self.boxes), np.float64).reshape(-1, 4)
        if not len(corners):
            return ()
        width, height = images.read_size(image, name=f"example {index}")
        boxes = corners[:, [1, 0, 3, 2]] * [width, height, width, height]
        return tuple(
            records.ObjectAnnotation(
                name=self.label_names[label].replace("_", " ").lower(),
                box=tuple(box),
                category_id=int(label),
            )
            for box, label in zip(boxes.tolist(), _value(example, self.labels), strict=True)
        )


def _plain(value: Any) -> Any:
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _value(example: Example, name: str) -> Any:
    """The value of a feature; a name with a slash may be a key itself or a path."""
    if name in example:
        return example[name]
    first, _, rest = name.partition("/")
    return _value(example[first], rest)


def _feature(features: Any, name: str) -> Any:
    if not hasattr(features, "keys"):
        return None
    if name in features:
        found = features[name]
        return getattr(found, "feature", found)  # a sequence of plain features wraps one
    first, _, rest = name.partition("/")
    inner = features[first] if rest and first in features else None
    return _feature(getattr(inner, "feature", inner), rest)


def _flat_names(features: Any, prefix: str = "") -> list[str]:
    names = []
    for key in features:
        inner = getattr(features[key], "feature", features[key])
        names += _flat_names(inner, f"{prefix}{key}/") if hasattr(inner, "keys") else [prefix + key]
    return names
