"""What follows training: the benchmark, the report, the export and its proof."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from perception_jax import api
from perception_jax.data.images import decode
from perception_jax.errors import CheckpointError
from perception_jax.systems.contrastive import report as report_page
from perception_jax.systems.contrastive.report import Findings
from perception_jax.systems.contrastive.task import ContrastiveTask
from perception_jax.train.metrics import read_metrics


def report(
    task: ContrastiveTask,
    model: nnx.Module,
    folder: pathlib.Path,
    *,
    config: Mapping[str, Any],
    title: str,
) -> Findings:
    """Runs the benchmark, writes `results.json` and `report.html`, and prints the numbers.

    Args:
      folder: exists; a training workdir's `metrics.jsonl` gives the report its curves.
      config: resolved settings, for the report.
      title: of the report.
    """
    findings = report_page.evaluate(model, task.benchmark)
    numbers = findings.numbers()
    results = folder / "results.json"
    results.write_text(json.dumps(numbers, indent=2) + "\n")
    history = read_metrics(folder)
    steps = max((row["step"] for row in history), default=0)
    batch = config["train"]["batch_size"]
    trained = f"{steps:,} steps of {batch} images. " if steps else ""
    page = report_page.write(
        folder / "report.html",
        model=model,
        benchmark=task.benchmark,
        findings=findings,
        history=history,
        config=config,
        title=title,
        subtitle=f"{trained}Everything below is measured on images that were not trained on.",
    )
    for name, value in numbers.items():
        print(f"  {name:36s} {value:.4g}")
    print(f"results     {results}\nreport      {page}")
    return findings


def export_and_verify(
    task: ContrastiveTask, model: nnx.Module, folder: pathlib.Path
) -> pathlib.Path:
    """Exports the model as a Hugging Face folder, loads it back and compares embeddings.

    Raises:
      CheckpointError: they differ by more than 1e-5.
    """
    loaded = api.Loaded(model=model, config=task.clip, processor=task.processor)
    api.export(loaded, folder, overwrite=True)
    again = api.load(folder)
    image = decode(task.benchmark.pictures[0].image)
    before = model.vision(task.processor.images([image])).embedding
    after = again.model.vision(again.processor.images([image])).embedding
    worst = float(np.abs(np.asarray(before) - np.asarray(after)).max())
    if not worst <= 1e-5:
        raise CheckpointError(
            f"expected the export in {folder} to give the same embeddings when it is loaded back, "
            f"found a difference of {worst:.3g}. The checkpoint in the work directory is intact."
        )
    print(f"checkpoint  {folder} (Hugging Face layout; loads back with equal embeddings)")
    return folder
