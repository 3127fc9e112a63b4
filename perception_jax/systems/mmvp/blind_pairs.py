"""Blind pairs of a folder of images or of files of embeddings: search, results, contact sheet.

The pairs of each block of columns are kept as a prediction (`evals.runner`), so that a search that
was stopped goes on, and several processes can share the blocks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from perception_jax.data.sources.folder import ImageFolder
from perception_jax.errors import ConfigError, DataError, ImageError
from perception_jax.evals import runner
from perception_jax.evals.predictions import Prediction, read_predictions
from perception_jax.evals.vqa.asking import write_lines
from perception_jax.systems.mmvp.embed import ImageEmbedder, embed_images
from perception_jax.systems.mmvp.embedding_files import is_embedding_file, read_embeddings
from perception_jax.systems.mmvp.encoders import open_encoder
from perception_jax.systems.mmvp.mining import BlindPairs, Miner, Thresholds

if TYPE_CHECKING:
    from jax.sharding import Mesh

PAIRS_FILE, SHEET_FILE = "pairs.jsonl", "pairs.html"
"""Names of the results."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class EmbeddedImages:
    """Images with the embeddings of both encoders.

    Attributes:
      names: of the images; numbers where nothing else is known.
      paths: their files, or None.
      first, second: embeddings, one row for each.
      skipped: number of images that could not be read and are left out.
    """

    names: tuple[str, ...]
    paths: tuple[pathlib.Path, ...] | None
    first: np.ndarray
    second: np.ndarray
    skipped: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What to search and how.

    Attributes:
      first, second: encoders (`encoders.encoder_of`), or files of embeddings.
      images: folder of images, or None for two files of embeddings.
      thresholds: which pairs are blind.
      columns: of a block.
      batch: images of a call.
      share: index and number of the processes that share the work in one folder.
      wait: returns once all of these have come to the same call of it; None does not wait.
    """

    first: str
    second: str
    images: pathlib.Path | None
    thresholds: Thresholds
    columns: int
    batch: int = 64
    share: tuple[int, int] = (0, 1)
    wait: Callable[[], None] | None = None


def embedded(
    settings: SearchSettings, out: pathlib.Path, mesh: Mesh | None
) -> EmbeddedImages | None:
    """Reads or computes the embeddings of all images.

    Returns:
      None if other processes have not computed theirs yet.

    Raises:
      ConfigError: encoders without a folder of images.
      DataError: files that cannot be read, or are of other images than each other or the folder.
    """
    source = None if settings.images is None else ImageFolder(settings.images)
    names = None if source is None else tuple(source[k].id for k in range(len(source)))
    paths = None if names is None else tuple(settings.images / name for name in names)
    found = []
    for which, text in (("first", settings.first), ("second", settings.second)):
        if is_embedding_file(text):
            one = read_embeddings(text)
            names = _same_names(names, one.names, f"--{which}={text}")
            found.append(one.vectors)
            continue
        if paths is None:
            raise ConfigError(f"--{which}={text}: an encoder needs --images, a folder of images.")
        embedder = ImageEmbedder(open_encoder(text, mesh), batch=settings.batch, mesh=mesh)
        found.append(
            embed_images(
                embedder,
                paths,
                out / "embeddings",
                share=settings.share,
                wait=settings.wait,
                title=f"{which} encoder",
            )
        )
        del embedder  # the next encoder may need the memory
    if any(one is None for one in found):
        return None
    first, second = found
    if names is not None and len(names) != len(first):
        raise DataError(
            f"expected a row of embeddings for each of {len(names)} images, found {len(first)}."
        )
    names = tuple(map(str, range(len(first)))) if names is None else names
    return _readable(EmbeddedImages(names=names, paths=paths, first=first, second=second), settings)


def search(
    images: EmbeddedImages, settings: SearchSettings, out: pathlib.Path, mesh: Mesh | None
) -> BlindPairs | None:
    """Searches the blocks that `out/search` does not have yet.

    Returns:
      All pairs, or None if other processes have not searched their blocks yet.

    Raises:
      DataError: embeddings that cannot be compared, or too many pairs.
    """
    import tqdm

    miner = Miner(
        images.first, images.second, settings.thresholds, columns=settings.columns, mesh=mesh
    )
    model_id = _digest(images, settings)
    folder = out / "search" / model_id
    ids = [f"columns {block.start} to {block.stop}" for block in miner.blocks]

    def run(left: Sequence[int]) -> Iterator[Prediction]:
        found = miner.search([miner.blocks[k] for k in left])
        hidden = not sys.stderr.isatty()
        bar = tqdm.tqdm(found, "search", len(left), unit="block", disable=hidden)
        for k, pairs in zip(left, bar, strict=True):
            yield Prediction(
                id=ids[k],
                output=_as_text(pairs),
                model_id=model_id,
                extras={"similar": pairs.similar, "lowest": _finite(pairs.lowest)},
            )

    runner.predict(ids, run, folder, model_id=model_id, host=settings.share)
    if settings.wait is not None:
        settings.wait()
    blocks = {one.id: one for one in read_predictions(folder, none_ok=True)}
    if any(name not in blocks for name in ids):
        return None
    return BlindPairs.joined([_from_text(blocks[name]) for name in ids])


def write_pairs(out: pathlib.Path, images: EmbeddedImages, pairs: BlindPairs) -> pathlib.Path:
    """Writes `pairs.jsonl`: `i`, `j`, `s_clip`, `s_dino` and the names of both images, a line for
    each pair."""
    columns = (pairs.i.tolist(), pairs.j.tolist(), pairs.first.tolist(), pairs.second.tolist())
    rows = (
        {
            "i": i,
            "j": j,
            "s_clip": near,
            "s_dino": far,
            "image_i": images.names[i],
            "image_j": images.names[j],
        }
        for i, j, near, far in zip(*columns, strict=True)
    )
    return write_lines(out / PAIRS_FILE, rows)


def write_sheet(
    out: pathlib.Path,
    images: EmbeddedImages,
    pairs: BlindPairs,
    settings: SearchSettings,
    *,
    most: int,
) -> pathlib.Path | None:
    """Writes the contact sheet `pairs.html` with the first pairs; None without image files."""
    if images.paths is None:
        return None
    from perception_jax.viz import Report

    limits = settings.thresholds
    report = Report(
        "Blind pairs",
        f"Pairs of images with a cosine above {limits.above:g} by `{settings.first}` and below "
        f"{limits.below:g} by `{settings.second}`.",
    )
    counts = {
        "images": len(images.names),
        "images that could not be read": images.skipped,
        "pairs that the first encoder finds similar": pairs.similar,
        "of these blind: different for the second": len(pairs),
    }
    report.add_table(("what", "number"), list(counts.items()))
    shown = min(most, len(pairs))
    title = f"The first {shown} pairs" if shown < len(pairs) else "All pairs"
    intro = (
        "Cosines of both encoders below the first image; those that the first encoder finds most "
        "similar come first."
    )
    if shown:
        report.add_section(title, intro)
        report.add_image_rows([_row(images, pairs, k) for k in range(shown)], width=280)
    report.add_details({**_facts(settings), "images": str(settings.images)}, summary="Settings")
    return report.write(out / SHEET_FILE)


def _row(images: EmbeddedImages, pairs: BlindPairs, k: int) -> list[tuple[np.ndarray, str]]:
    from perception_jax.data.images import decode

    cosines = f"first {pairs.first[k]:.3f}, second {pairs.second[k]:.3f}"
    row = []
    for number in (int(pairs.i[k]), int(pairs.j[k])):
        try:
            picture = decode(images.paths[number])
        except ImageError as error:  # deleted since it was embedded
            _log.warning("not shown: %s", error)
            picture = np.full((8, 8, 3), 128, np.uint8)
        row.append((picture, images.names[number] if row else f"{images.names[number]}\n{cosines}"))
    return row


def _same_names(
    known: tuple[str, ...] | None, found: tuple[str, ...] | None, where: str
) -> tuple[str, ...] | None:
    if known is not None and found is not None and known != found:
        k = next(
            (k for k, pair in enumerate(zip(known, found, strict=False)) if len({*pair}) > 1), 0
        )
        raise DataError(
            f"{where}: expected the embeddings of the same {len(known)} images in the same order, "
            f"found {len(found)}, the first other one {found[k]!r} instead of {known[k]!r}."
        )
    return found if known is None else known


def _readable(images: EmbeddedImages, settings: SearchSettings) -> EmbeddedImages:
    """Without the images that an encoder of ours could not read (rows of NaN)."""
    bad = np.zeros(len(images.names), bool)
    for text, vectors in ((settings.first, images.first), (settings.second, images.second)):
        if not is_embedding_file(text):  # in a file NaN is an error
            bad |= np.isnan(vectors).any(axis=1)
    if not bad.any():
        return images
    kept = np.flatnonzero(~bad)
    return EmbeddedImages(
        names=tuple(images.names[k] for k in kept),
        paths=None if images.paths is None else tuple(images.paths[k] for k in kept),
        first=images.first[kept],
        second=images.second[kept],
        skipped=int(bad.sum()),
    )


def _facts(settings: SearchSettings) -> dict[str, Any]:
    return {
        "first": settings.first,
        "second": settings.second,
        **dataclasses.asdict(settings.thresholds),
        "columns": settings.columns,
    }


def _digest(images: EmbeddedImages, settings: SearchSettings) -> str:
    """16 hexadecimal digits for all that the pairs of a block depend on."""
    digest = hashlib.sha256(json.dumps(_facts(settings), sort_keys=True).encode())
    for vectors in (images.first, images.second):
        digest.update(repr((vectors.shape, vectors.dtype.str)).encode())
        for start in range(0, len(vectors), 65_536):
            digest.update(np.ascontiguousarray(vectors[start : start + 65_536]).data)
    return digest.hexdigest()[:16]


def hint(pairs: BlindPairs, limits: Thresholds) -> str:
    """What to change if no pair was found; "" if some were."""
    if len(pairs):
        return ""
    if not pairs.similar:
        return f"no cosine of the first encoder is above {limits.above:g}: lower --above"
    return (
        f"among the similar pairs the lowest cosine of the second encoder is {pairs.lowest:.3f}: "
        "raise --below above it"
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _as_text(pairs: BlindPairs) -> str:
    columns = (pairs.i, pairs.j, pairs.first, pairs.second)
    return json.dumps([column.tolist() for column in columns])


def _from_text(prediction: Prediction) -> BlindPairs:
    extras: Mapping[str, Any] = prediction.extras
    i, j, first, second = json.loads(prediction.output)
    return BlindPairs(
        i=np.array(i, np.int64),
        j=np.array(j, np.int64),
        first=np.array(first, np.float32),
        second=np.array(second, np.float32),
        similar=extras["similar"],
        lowest=math.inf if extras["lowest"] is None else extras["lowest"],
    )
