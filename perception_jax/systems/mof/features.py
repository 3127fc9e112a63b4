"""Features of frozen image towers, computed once for all records and kept in folders."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from perception_jax.api import Loaded
from perception_jax.data.kept_features import INDEX, FeaturesWriter, KeptFeatures
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Record, Source
from perception_jax.errors import ConfigError, DataError
from perception_jax.inference.batches import Batched
from perception_jax.interop.fingerprint import fingerprint
from perception_jax.models.llava.config import LlavaConfig, tower_vision
from perception_jax.models.llava.modeling import tower_features
from perception_jax.models.params import flatten
from perception_jax.systems.mof.records import some_records

_log = logging.getLogger(__name__)

TOWER = "tower-{}"
"""Name of the folder of an image tower's features."""

Encode = Callable[[UInt8[np.ndarray, "B S S 3"], Sequence[Record]], Float[np.ndarray, "B P C"]]
"""Function from processed images and the record of each to their features."""


def opened_features(
    folders: Sequence[str | os.PathLike[str]], config: LlavaConfig
) -> tuple[KeptFeatures, ...]:
    """The kept features of each image tower of a model; () without folders.

    Raises:
      ConfigError: another number of folders than of towers, or features of other towers.
      DataError: files that cannot be read.
    """
    if not folders:
        return ()
    if len(folders) != len(config.towers):
        raise ConfigError(
            f"features: expected a folder for each of {len(config.towers)} image tower(s), found "
            f"{len(folders)}."
        )
    found = tuple(KeptFeatures(folder) for folder in folders)
    patches = config.grid[0] * config.grid[1] + config.prefix
    for kept, tower, layer in zip(found, config.towers, config.layers, strict=True):
        shape = (patches, tower_vision(tower).width)
        if kept.shape != shape or kept.made.get("layer") != layer:
            raise ConfigError(
                f"{kept.folder}: expected {list(shape)} features of hidden state {layer}, found "
                f"{list(kept.shape)} of {kept.made.get('layer')}. Compute them for this model."
            )
    return found


def compare_images(
    kept: Sequence[KeptFeatures], processor: ImageProcessor, records: Source
) -> None:
    """Makes sure by a few records, spread over all, that features are those of their images.

    Args:
      kept: of each image tower; () compares nothing.
      processor: of the images.

    Raises:
      DataError: as `KeptFeatures.compare`, or features of a readable image are missing.
    """
    for record in some_records(records) if kept else ():
        own = _pixels(processor, record)
        for one in kept if own else ():
            one[record.id]  # raises where there are none
            one.compare(record.id, np.stack(own))


def kept_features(
    folder: str | os.PathLike[str], loaded: Loaded, records: Source
) -> tuple[KeptFeatures, ...]:
    """The features of records below a folder, computed first if they are not there.

    They lie in a folder named after the towers' weights, the images' processor and some records.

    Args:
      loaded: whose image towers are read for it, if their weights are unread.
      records: all of them.

    Raises:
      ConfigError: several processes, which would write the same files.
      DataError: as `write_features`.
    """
    if jax.process_count() > 1:
        raise ConfigError(
            "data.keep: features are computed by one process, found several. Run the first steps "
            "on one, and give all of them the folders as data.features."
        )
    towers = _towers(loaded)
    weights = [fingerprint(flatten(tower), exact=True) for tower in towers]
    some = (len(records), [record.id for record in some_records(records)])
    settings = repr((weights, loaded.processor.image, loaded.config.layers, some))
    own = pathlib.Path(folder) / hashlib.sha256(settings.encode()).hexdigest()[:16]
    paths = [own / TOWER.format(k + 1) for k in range(len(towers))]
    if not all((path / INDEX).is_file() for path in paths):
        write_features(loaded, records, own)
    return opened_features(paths, loaded.config)


def write_features(
    loaded: Loaded, records: Source, folder: pathlib.Path, *, batch_size: int = 64
) -> tuple[pathlib.Path, ...]:
    """Computes what each image tower of a LLaVA gives for all images of some records.

    Records with an image that cannot be read are named in the log and left out.

    Args:
      folder: gets a folder for each tower.

    Returns:
      The folders.

    Raises:
      DataError: no image can be read, or the features cannot be written.
    """
    towers = _towers(loaded)
    dtype = next(iter(flatten(towers[0]).values())).dtype

    def features(towers: Sequence[nnx.Module | None], pixels: Array) -> Array:
        return tower_features(loaded.config, towers, pixels[:, None], dtype)[0][:, 0]

    run, encoders = Batched(features, batch_size=batch_size), []
    for k, layer in enumerate(loaded.config.layers):
        alone = [tower if k == place else None for place, tower in enumerate(towers)]
        writer = FeaturesWriter(
            folder / TOWER.format(k + 1), made={"layer": layer, "of": loaded.name}
        )
        encoders.append((lambda pixels, owners, alone=alone: run(alone, pixels), writer))
    encode_records(encoders, loaded.processor.image, records, batch_size=batch_size)
    return tuple(writer.folder for _, writer in encoders)


def encode_records(
    encoders: Sequence[tuple[Encode, FeaturesWriter]],
    processor: ImageProcessor,
    records: Source,
    *,
    batch_size: int,
) -> None:
    """Keeps the features of any encoders, also of one that reads the question.

    Args:
      encoders: each with the writer of its features, of which "layer" of `made` is compared with
        the model's.
      records: read once, in their order.
      batch_size: images of a call.

    Raises: as `write_features`.
    """
    import tqdm

    def parts() -> Iterator[tuple[list[Record], list[np.ndarray]]]:
        owners: list[Record] = []
        pixels: list[np.ndarray] = []
        for k in tqdm.trange(len(records), unit="record", desc="features", disable=None):
            record = records[k]
            own = _pixels(processor, record)
            owners += [record] * len(own)
            pixels += own
            if len(pixels) >= batch_size:
                yield owners, pixels
                owners, pixels = [], []
        if pixels:
            yield owners, pixels

    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(writer) for _, writer in encoders]
        for owners, pixels in parts():
            stacked, places = np.stack(pixels), range(len(owners))
            for encode, writer in encoders:
                found = np.asarray(encode(stacked, owners))
                for identity, own in itertools.groupby(places, key=lambda k: owners[k].id):
                    rows = list(own)
                    writer.add(identity, found[rows], stacked[rows])
        for writer in writers:
            writer.finish()


def _pixels(processor: ImageProcessor, record: Record) -> list[np.ndarray]:
    """The processed images of a record; none, with a warning, if one cannot be read."""
    try:
        return [processor.read(one, name=record.id).pixels for one in record.images]
    except DataError as error:  # training skips and counts a record without features
        _log.warning("no features: %s", error)
        return []


def _towers(loaded: Loaded) -> list[nnx.Module]:
    """The image towers, read if they are not yet."""
    names = ("vision", "second_vision")[: len(loaded.config.towers)]
    return [loaded.part(name) for name in names]
