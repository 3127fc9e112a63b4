"""Parts of a report that every system has: learning curves, example images, run settings.

`history` is the rows of a run's `metrics.jsonl`; a row lacks the values that were not logged then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from perception_jax.viz.charts import line_chart
from perception_jax.viz.html_report import Report

History = Sequence[Mapping[str, Any]]
"""Rows of `metrics.jsonl`, each with "step"."""

Curve = tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]
"""Steps and the values that were logged at them."""


def curves(history: History, titles: Mapping[str, str], *, least: int = 1) -> dict[str, Curve]:
    """Series for `line_chart`, by title.

    Args:
      titles: the title of each logged value, by its name in the history.
      least: {} if no curve has at least that many points.
    """
    found = {}
    for key, title in titles.items():
        rows = [row for row in history if row.get(key) is not None]
        if rows:
            steps = np.array([row["step"] for row in rows])
            found[title] = steps, np.array([row[key] for row in rows], np.float64)
    return found if any(len(steps) >= least for steps, _ in found.values()) else {}


def step_chart(series: Mapping[str, Curve], title: str, y_label: str, **options: Any) -> str | None:
    """Chart of curves over the steps, with options of `line_chart`; None without a curve."""
    return line_chart(series, title, x_label="step", y_label=y_label, **options) if series else None


def subtitle(history: History, *, rows: int, measured_on: str) -> str:
    """The line under a report's title: the length of the training, and the test images.

    Args:
      history: empty for a model that was trained elsewhere.
      rows: of a batch.
      measured_on: what the test images are, e.g. "images that were not trained on".
    """
    steps = max((row["step"] for row in history), default=0)
    trained = f"{steps:,} steps of {rows} rows. " if steps else ""
    return f"{trained}Everything below is measured on {measured_on}."


def add_learning_curves(report: Report, charts: Iterable[str | None], intro: str = "") -> None:
    """Adds the section "Learning curves"; nothing if there is no chart.

    Args:
      charts: of `line_chart` or `bar_chart`; None for one that could not be drawn.
    """
    drawn = [chart for chart in charts if chart]
    if drawn:
        report.add_section("Learning curves", intro)
        for chart in drawn:
            report.add_chart(chart)


def add_examples(
    report: Report, title: str, intro: str, groups: Iterable[Sequence[tuple]], *, width: int
) -> None:
    """Adds a section of example images, e.g. right and wrong ones; nothing if all are empty.

    Args:
      groups: image cards as of `Report.add_images`, each group in columns of its own.
      width: smallest card width in CSS pixels.
    """
    filled = [group for group in groups if group]
    if filled:
        report.add_section(title, intro)
        for group in filled:
            report.add_images(group, width=width)


def training_rows(train: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Optimizer, steps and seed as pairs (setting, value) in words. Args: train: `TrainConfig`."""
    optim = train["optim"]
    warmup = f", {optim['warmup_steps']} steps of warm-up, {optim['schedule']}"
    optimizer = f"{optim['name']}, learning rate {optim['learning_rate']:g}{warmup}"
    steps = f"{train['steps']:,}"
    return [("optimizer", optimizer), ("steps", steps), ("seed", str(train["seed"]))]


def add_run_settings(
    report: Report,
    config: Mapping[str, Any],
    *,
    rows: Sequence[tuple[str, str]] = (),
    note: str = "",
) -> None:
    """Adds the section "Run settings": a table, a note, and the whole configuration, folded.

    Args:
      config: the resolved settings.
      rows: pairs (setting, value) in words.
    """
    report.add_section("Run settings", "" if rows else "The configuration, for running it again.")
    if rows:
        report.add_table(("setting", "value"), rows)
    if note:
        report.add_text(note)
    report.add_details(config)


def language_report(
    title: str,
    texts: str,
    *,
    counts: str,
    numbers: Mapping[str, float],
    history: History,
    held_out: str,
    settings: Mapping[str, Any],
    rows: Sequence[tuple[str, str]],
    further: Callable[[Report], None] | None = None,
) -> Report:
    """Makes the report of a training on texts: results on held-out ones, curves, settings.

    Args:
      texts: what they are, e.g. "conversations".
      counts: how many were held out.
      numbers: the results on them.
      held_out: name of the evaluator whose "loss" is drawn beside that of training.
      settings: of the config; `rows` are the first ones that the page shows.
      further: adds results of its own, between the first ones and the curves.
    """
    measured_on = f"{texts} that were not trained on"
    train = settings["train"]
    page = Report(title, subtitle(history, rows=train["batch_size"], measured_on=measured_on))
    page.add_section("Results", f"Test {counts}.")
    page.add_table(("number", "value"), [(name, f"{value:.4g}") for name, value in numbers.items()])
    if further is not None:
        further(page)
    titles = {"loss": "training", f"evaluate/{held_out}/loss": "held out"}
    drawn = curves(history, titles)
    add_learning_curves(page, [step_chart(drawn, "Cross-entropy", "nats per predicted token")])
    add_run_settings(page, settings, rows=[*rows, *training_rows(train)])
    return page
