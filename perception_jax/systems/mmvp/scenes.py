"""Minimal pairs of scenes as files: in the layouts of MMVP and MMVP-VLM, or plain images."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Sequence

import PIL.Image

from perception_jax.data.records import MMVP_PATTERNS, MinimalPair
from perception_jax.data.scenes import PairSource
from perception_jax.data.scenes.sample import SceneConfig
from perception_jax.data.scenes.source import ScenesSource
from perception_jax.evals.vqa.mmvp import PATTERNS
from perception_jax.files import write_whole

PAIRS_EACH = 15
"""Pairs of each pattern, as in MMVP-VLM."""


def draw_pairs(config: SceneConfig, *, each: int = PAIRS_EACH, seed: int = 0) -> list[MinimalPair]:
    """Pairs of each pattern, pattern after pattern in the paper's order.

    Raises:
      ConfigError: as of `PairSource`.
    """
    sources = (PairSource(config, seed=seed, length=each, patterns=(p,)) for p in MMVP_PATTERNS)
    return [source[k] for source in sources for k in range(each)]


def write_vlm(folder: pathlib.Path, pairs: Sequence[MinimalPair]) -> None:
    """Writes pairs as MMVP-VLM's files: `Questions.csv`, `MMVP_VLM_Images/<pattern>/<id>.jpg`."""
    rows = [["Question ID", "Type", "Statement"]]
    for k, pair in enumerate(pairs):
        for side, record in enumerate(pair.records):
            number = 2 * k + side + 1
            rows.append([str(number), pair.pattern, pair.statements[side]])
            _save(record.image, folder / "MMVP_VLM_Images" / pair.pattern / f"{number}.jpg")
    _write_csv(folder / "Questions.csv", rows)


def write_questions(folder: pathlib.Path, pairs: Sequence[MinimalPair]) -> None:
    """Writes pairs as MMVP's files: `Questions.csv`, `MMVP Images/<number>.jpg`, and the pattern of
    each pair in `patterns.json`."""
    rows = [["Index", "Question", "Options", "Correct Answer"]]
    for k, pair in enumerate(pairs):
        letters = dict(zip(pair.options, "ab", strict=True))
        options = " ".join(f"({letter}) {option}" for option, letter in letters.items())
        for side, record in enumerate(pair.records):
            number = 2 * k + side + 1
            answer = f"({letters[pair.answers[side]]})"
            rows.append([str(number), pair.question, options, answer])
            _save(record.image, folder / "MMVP Images" / f"{number}.jpg")
    _write_csv(folder / "Questions.csv", rows)
    names = dict(zip(MMVP_PATTERNS, PATTERNS, strict=True))
    write_whole(folder / "patterns.json", json.dumps([names[one.pattern] for one in pairs]))


def write_images(
    folder: pathlib.Path, config: SceneConfig, *, each: int = 40, others: int = 300, seed: int = 0
) -> None:
    """Writes images of minimal pairs, `<pattern>/<number>-a.png` and `-b.png`, and those of other
    scenes, `other/<number>.png`. Files that are there already stay as they are.

    Args:
      each: pairs of each pattern.
      others: scenes that are no pairs.
    """
    for k, pair in enumerate(draw_pairs(config, each=each, seed=seed)):
        for side, record in zip("ab", pair.records, strict=True):
            _save_once(record.image, folder / pair.pattern / f"{k % each:04d}-{side}.png")
    plain = ScenesSource(dataclasses.replace(config, language="none"), seed=seed, length=others)
    for k in range(others):
        _save_once(plain[k].image, folder / "other" / f"{k:04d}.png")


def _save_once(image: object, path: pathlib.Path) -> None:
    # Embeddings are kept by the times of the files.
    if not path.exists():
        _save(image, path)


def _save(image: object, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    # The names of the original files end in .jpg; PNG inside keeps small drawings exact.
    PIL.Image.fromarray(image).save(content, "PNG")
    write_whole(path, content.getvalue())


def _write_csv(path: pathlib.Path, rows: Sequence[Sequence[str]]) -> None:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    write_whole(path, file.getvalue())
