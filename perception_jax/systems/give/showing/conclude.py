"""What follows the training of a GiVE: evaluation, report, its files and the proof that they load.

The adapters' own file is always written. Backbone and adapters together become a folder where the
backbone has a Hugging Face layout.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from perception_jax.api import Loaded
from perception_jax.data.records import Source
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.files import write_whole
from perception_jax.interop.writer import replacing_folder
from perception_jax.nn import stack
from perception_jax.systems.give.checkpoint import ADAPTERS_FILE, save_give
from perception_jax.systems.give.evaluation.evaluate import Evaluated, Evaluation, main_numbers
from perception_jax.systems.give.export import export_merged
from perception_jax.systems.give.model import Give
from perception_jax.systems.give.pretrained import GiveEncoder
from perception_jax.systems.give.showing import report as report_page
from perception_jax.systems.give.showing.report_pictures import Pictures
from perception_jax.systems.give.task import GiveTask
from perception_jax.train.metrics import read_metrics

FOLDER = "hf"
"""Of backbone and adapters together, inside a workdir."""
TOLERANCE = 1e-5
"""Largest difference of an embedding or presence logit that was written and read back."""


def report(
    task: GiveTask,
    model: nnx.Module,
    folder: pathlib.Path,
    *,
    config: Mapping[str, Any],
    title: str,
    trained_on: str,
    measured_on: str,
    records: Source | None = None,
) -> Evaluated | None:
    """Evaluates, writes `results.json` and `report.html`, and prints the main numbers.

    Args:
      folder: exists; a training workdir's `metrics.jsonl` gives the report its curves.
      config: resolved settings, for the report.
      title: of the report.
      trained_on: what the training images are, for the report's table.
      measured_on: what the test images are, e.g. "images that were not trained on".
      records: what was to be measured, in order; None for a report without pictures.

    Returns:
      What was measured; None if the task has nothing to evaluate on.
    """
    evaluators = {k: v for k, v in task.evaluators().items() if isinstance(v, Evaluation)}
    if not evaluators:
        print("nothing to evaluate on, so there is no report")
        return None
    name, evaluation = next(iter(evaluators.items()))
    evaluated = evaluation.run(model)
    numbers = {f"{name}/{key}": value for key, value in main_numbers(evaluated.report).items()}
    results = folder / "results.json"
    write_whole(results, json.dumps({**numbers, "scores": _all_scores(evaluated)}, indent=2) + "\n")
    history = read_metrics(folder)
    if not task.config.losses.oid:  # a head that does not train tells nothing of the plateau
        history = [{k: v for k, v in row.items() if k != "oid"} for row in history]
    pictures = None
    if records is not None:
        measured = records if evaluation.records is None else evaluation.records
        pictures = Pictures(model, task.encoder, measured, evaluated.measured)
    page = report_page.write(
        folder / "report.html",
        evaluated=evaluated,
        pictures=pictures,
        story=report_page.Story(
            title=title,
            subtitle=f"{_trained(history, config)}Everything below is measured on {measured_on}.",
            evaluator=name,
            history=history,
            settings=[("trained on", trained_on), *settings_in_words(task, model, config)],
            config=config,
        ),
    )
    for key, value in numbers.items():
        print(f"  {key:44s} {value:.4g}")
    print(f"results     {results}\nreport      {page}")
    return evaluated


def save(model: Give, backbone: Loaded, workdir: pathlib.Path) -> None:
    """Writes the adapters as `workdir/give.safetensors`, and backbone and adapters as the folder
    `workdir/hf`, which is loaded back and compared before it replaces an older one.

    Raises:
      CheckpointError: a file cannot be written, or what is read back differs.
    """
    adapters = workdir / ADAPTERS_FILE
    save_give(adapters, model, backbone)
    print(f"adapters    {adapters} (for the backbone {backbone.name})")
    target, encoder = workdir / FOLDER, GiveEncoder(model, backbone)
    try:
        with replacing_folder(target, overwrite=True) as fresh:
            export_merged(fresh, encoder)
            _verify(encoder, fresh)
    except ConfigError as error:
        print(f"no folder of both: {error}")
        return
    print(f"checkpoint  {target} (backbone and adapters; loads back with equal outputs)")


def settings_in_words(
    task: GiveTask, model: Give, config: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """What was trained and how, for people."""
    vision = model.backbone.vision
    blocks, adapter = vision.blocks, vision.blocks.inserts
    losses, sampler = task.config.losses, config["sampler"]
    image = task.backbone.processor.image
    train = config["train"]
    groups = "groups of one class" if sampler["grouped"] else "random groups"
    weights = ", ".join(f"{name.upper()} {getattr(losses, name):g}" for name in _LOSSES)
    return [
        ("backbone, frozen", task.backbone.name or "as given"),
        ("image", f"{image.size} × {image.size} pixels, {image.mode}"),
        (
            "adapters",
            f"{len(blocks.layers)}, in blocks {', '.join(str(k + 1) for k in blocks.layers)} of "
            f"{stack.depth_of(blocks)}, {adapter.heads} heads each",
        ),
        ("losses, weights", weights + ("" if losses.absent_rows else "; OIIC without absent rows")),
        (
            "batch",
            f"{sampler['groups']} {groups} × {sampler['images']} images × 2 objects = "
            f"{train['batch_size']} rows, each also under an absent instruction",
        ),
        (
            "optimizer",
            f"{train['optim']['name']}, learning rate {train['optim']['learning_rate']:g}, "
            f"{train['optim']['warmup_steps']} steps of warm-up, {train['optim']['schedule']}",
        ),
        ("steps", f"{train['steps']:,}"),
        ("seed", str(train["seed"])),
    ]


_LOSSES = ("oitc", "oiic", "oid")
_PROBES = ("the kite", "a dog")


def _all_scores(evaluated: Evaluated) -> dict[str, Any]:
    """Every number of every protocol; whose stratum each pair is in stays with the data."""
    return {key: part for key, part in evaluated.report.to_dict().items() if key != "strata"}


def _trained(history: list[dict[str, Any]], config: Mapping[str, Any]) -> str:
    steps = max((row["step"] for row in history), default=0)
    return f"{steps:,} steps of {config['train']['batch_size']} rows. " if steps else ""


def _verify(encoder: GiveEncoder, folder: pathlib.Path) -> None:
    """Compares what a folder gives with what the model gives, steered and not."""
    again = GiveEncoder.from_pretrained(folder)
    side = encoder.processor.image.size
    # Not square, so that how images become squares is compared too.
    shape = (len(_PROBES), side, 2 * side, 3)
    images = list(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    for instructions in (None, _PROBES):
        before, after = (one.encode(images, instructions) for one in (encoder, again))
        worst = float(np.abs(before.embedding - after.embedding).max())
        if instructions is not None:
            logits = np.abs(before.presence_logit - after.presence_logit)
            worst = max(worst, float(logits.max()))
        if not worst <= TOLERANCE:
            raise CheckpointError(
                f"expected the folder of backbone and adapters to give the same outputs when it is "
                f"loaded back, found a difference of {worst:.3g}. The checkpoints in the work "
                "directory are intact."
            )
