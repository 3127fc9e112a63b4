"""Small LLaVAs on scenes: CLIP alone, added and interleaved with a self-supervised tower.

    PYTHONPATH=. python -m tests.bench.mof_scenes --out=runs/mof_scenes --ssl=runs/scenes_ssl/hf

Trains each arm with `configs/mof/scenes.py`, one after another, and prints their results on minimal
pairs and on questions beside what can be had without seeing. What is done is not done again, and an
arm that was stopped goes on. Arms `imof+plain` and `imof+give` go on from `imof` on single
questions, with features of the plain CLIP and of one that GiVE conditions on the question. The
latter needs adapters for `scenes-clip`:

    python -m launch.train --config=configs/give/scenes.py --workdir=runs/give_clip \
        --config.backbone=scenes-clip --config.data.size=72
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from configs.mof import scenes
from perception_jax.data.kept_features import FeaturesWriter
from perception_jax.data.records import Record, Source
from perception_jax.systems.give import GiveEncoder
from perception_jax.systems.mof import features, models, records

ARMS = (
    *("clip-0", "amof=0.25-0", "amof=0.5-0", "amof=0.75-0"),
    *("imof-0", "imof+plain-0", "imof+give-0"),
)
"""Arms with their seeds."""
LAYER = 3
"""Hidden state of scenes-clip that a LLaVA reads: the last but one of four blocks."""
ROOM = 56
"""Tokens of a single question and its answer."""
_BATCH = 64


def main() -> None:
    """Trains what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the runs")
    parser.add_argument("--ssl", required=True, help="the self-supervised tower, a DINOv2")
    parser.add_argument("--arms", nargs="+", default=ARMS, help="NAME-SEED")
    parser.add_argument("--give", default="", help="adapters for scenes-clip")
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE of all arms' config")
    parser.add_argument("--more", nargs="*", default=[], help="KEY=VALUE of those that go on")
    study = Study(**vars(parser.parse_args()))
    print(table({arm: study.results(arm) for arm in study.arms}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """The arguments of the command."""

    out: pathlib.Path
    ssl: str
    give: str
    arms: Sequence[str]
    set: Sequence[str]
    more: Sequence[str]

    def results(self, arm: str) -> Mapping[str, float]:
        """The results of an arm, trained if they are missing."""
        name, _, seed = arm.rpartition("-")
        folder = self.out / arm
        if not (folder / "results.json").is_file():
            goes_on = name.startswith("imof+")
            words = self._going_on(name, seed) if goes_on else self._from_start(name)
            mix, _, ratio = ("imof" if goes_on else name).partition("=")
            config = f"configs/mof/scenes.py:mix={mix}" + (f",ratio={ratio}" if ratio else "")
            command = [sys.executable, "-m", "launch.train", f"--config={config}"]
            command += [f"--workdir={folder}", f"--config.train.seed={seed}"]
            subprocess.run([*command, *(f"--config.{word}" for word in words)], check=True)
        return json.loads((folder / "results.json").read_text())

    def _from_start(self, name: str) -> list[str]:
        towers = ("scenes-clip",) if name == "clip" else ("scenes-clip", self.ssl)
        return [f"model.towers={towers}", f"data.keep={self.out / 'features'}", *self.set]

    def _going_on(self, name: str, seed: str) -> list[str]:
        """Settings of an arm on single questions; computes its features."""
        self.results(f"imof-{seed}")
        start, folder = self.out / f"imof-{seed}" / "llava", self.out / f"features-{name}"
        words = ["data.each=4", f"data.max_length={ROOM + 1}"]
        words += [f"data.lengths=({ROOM + 2 * scenes.PATCHES},)", *self.set, *self.more]
        config = scenes.get_config("mix=imof")
        config.update_from_flattened_dict(_typed(words))
        config.model.whole, config.model.towers = str(start), ()
        loaded = models.opened(config)
        for part, source in (("train", records.pictured(config)), ("test", _testing(config))):
            if (folder / part / features.TOWER.format(1) / "done").exists():
                continue
            features.write_features(loaded, source, folder / part, batch_size=_BATCH)
            if name == "imof+give":
                tower = folder / part / features.TOWER.format(1)
                _write_conditioned(source, loaded, tower, self.give)
            (folder / part / features.TOWER.format(1) / "done").touch()
        words += [f"model.whole={start}", "model.towers=()"]
        words += [f"data.features={_pair(folder / 'train')}"]
        return [*words, f"evaluation.features={_pair(folder / 'test')}"]


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Results of all arms as a table in Markdown."""
    kinds = sorted({key for numbers in found.values() for key in numbers if _is_result(key)})
    lines = ["| | " + " | ".join(found) + " |", "| --- |" + " --- |" * len(found)]
    for kind in kinds:
        cells = (f"{one[kind]:.1%}" if kind in one else "" for one in found.values())
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _is_result(key: str) -> bool:
    return key.startswith((records.PAIRS, records.QUESTIONS))


def _testing(config) -> list[Record]:
    """All records that the evaluators read."""
    sources = [records.conversations(config, test=True), *records.test_questions(config).values()]
    return [source[k] for source in sources for k in range(len(source))]


def _write_conditioned(source: Source, loaded, folder: pathlib.Path, give: str) -> None:
    """Features of the CLIP that GiVE conditions on each record's question."""
    encoder = GiveEncoder.from_pretrained(give)
    if encoder.backbone.name != "scenes-clip":
        raise SystemExit(f"--give={give}: expected adapters for scenes-clip")

    def encode(pixels: np.ndarray, owners: Sequence[Record]) -> np.ndarray:
        asked = [owner.questions[0].text for owner in owners]
        return np.asarray(encoder.llava_features(list(pixels), asked, layer=-2))

    writer = FeaturesWriter(folder, made={"layer": LAYER, "of": give})
    processor = loaded.processor.image
    features.encode_records([(encode, writer)], processor, source, batch_size=_BATCH)


def _pair(folder: pathlib.Path) -> str:
    return str(tuple(str(folder / features.TOWER.format(k)) for k in (1, 2)))


def _typed(words: Sequence[str]) -> dict[str, object]:
    """KEY=VALUE as values of the config."""
    found: dict[str, object] = {}
    for word in words:
        key, _, value = word.partition("=")
        try:
            found[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            found[key] = value
    return found


if __name__ == "__main__":
    main()
