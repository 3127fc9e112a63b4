"""The report of a GiVE run: one self-contained page, each number beside the unconditioned backbone.

A number that the instruction alone can raise is never shown by itself: naming is shown with its
copy floor, cosines of present objects with those of absent ones.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perception_jax.evals.conditioned.accumulate import Measured
from perception_jax.evals.conditioned.annotations import ABSENT
from perception_jax.evals.conditioned.results import ConditionedResults as Scores
from perception_jax.evals.conditioned.results import statistic
from perception_jax.evals.conditioned.tables import PAPER, tables
from perception_jax.evals.intervals import paired_interval
from perception_jax.nn import stack
from perception_jax.systems.give.evaluation.evaluate import Evaluated
from perception_jax.systems.give.model import Give
from perception_jax.systems.give.report import curves
from perception_jax.systems.give.report.pictures import Pictures, percent
from perception_jax.systems.give.task import GiveTask
from perception_jax.viz import Bar, Metric, Report, bar_chart, sections
from perception_jax.viz.sections import History

STATIC = "without an instruction"
"""Label of the unconditioned backbone."""
BLANK = "an image of one colour"
"""Label of the copy floor of a number: its value on an image without content."""
_LOSSES = ("oitc", "oiic", "oid")
_DECIDING = ("l_protocol", "presence", "map")
_CAPTION = ("image_to_text", "conditioned", "same_class_r@1")
_BARS = {
    "Finding the images that show an object (mAP)": _DECIDING,
    "Own caption among those of the same class (R@1)": _CAPTION,
    "Finding the image of a caption (R@1)": ("text_to_image", "conditioned", "r@1"),
    "Finding another image with the object (R@1)": ("image_to_image", "conditioned", "r@1"),
}


def write(
    path: pathlib.Path,
    *,
    evaluated: Evaluated,
    pictures: Pictures | None,
    evaluator: str,
    history: History,
    settings: Sequence[tuple[str, str]],
    config: Mapping[str, Any],
    title: str,
    subtitle: str,
) -> pathlib.Path:
    """Writes the page.

    Args:
      pictures: None leaves the sections with pictures out.
      evaluator: name of the evaluation in `metrics.jsonl`.
      history: rows of `metrics.jsonl`; may be empty. Without "oid" the plateau is not mentioned.
      settings: pairs (setting, value), in words.
      config: all settings, shown folded at the end.

    Raises:
      PerceptionError: the file cannot be written.
    """
    page, scores = Report(title, subtitle), evaluated.report
    _add_headline(page, evaluated, history)
    if pictures is not None:
        _add_scenes(page, pictures)
        _add_overlooked(page, pictures, evaluated.measured)
    _add_learning(page, scores, history, evaluator)
    _add_copying(page, scores, history, evaluator)
    _add_tables(page, evaluated)
    sections.add_run_settings(
        page,
        config,
        rows=[*settings, *_measured_rows(evaluated)],
        note="One run with one seed: differences of a point or two may be noise. The maps show "
        "what changes a score, not the outline of an object; the decision is the presence logit, "
        "not the map.",
    )
    return page.write(path)


def _add_headline(page: Report, evaluated: Evaluated, history: History) -> None:
    page.add_section(
        "Effect of the instruction",
        "The same backbone with an instruction (“the kite”) and without one. An overlooked object "
        "is not the largest of its image, or fills less than 2 % of it.",
    )
    found = curves.plateau(history)
    if found is not None and not found.left:
        page.add_text(
            "This run is too short: it has not left the plateau on which training begins, so the "
            "instruction has no useful effect yet. See “Learning curves”."
        )
    measured, scores = evaluated.measured, evaluated.report
    rows = [
        _presence_row(scores),
        *(
            _compared(
                measured,
                scores,
                _DECIDING,
                stratum,
                name=f"{what} objects: finding the images that show one (mAP)",
                meaning="For each class all images are ranked by their score for it (L-protocol).",
            )
            for what, stratum in (("Overlooked", "overlooked"), ("All", "all"))
        ),
        _caption_row(measured, scores),
        _naming_row(scores),
    ]
    page.add_metrics([row for row in rows if row is not None])
    groups = _bars(scores)
    if groups:
        title = "The largest objects and the overlooked ones"
        page.add_chart(bar_chart(groups, title, percent=True, maximum=1.0))


def _shares(
    scores: Scores, task: str, systems: Sequence[str], stratum: str, metric: str
) -> list[float] | None:
    """A number of several systems as fractions; None if its task was left out or has no query."""
    part = getattr(scores, task)
    if part is None:
        return None
    found = [part[system][stratum][metric] for system in systems]
    return None if None in found else found


def _presence_row(scores: Scores) -> Metric | None:
    systems = ("oid", "static", "blank")
    found, static, blank = (scores.diagnostics[f"{one}_auc"]["overlooked"] for one in systems)
    if found is None:
        return None
    return Metric(
        name="Overlooked objects: present or absent",
        value=found,
        baselines={STATIC: static, BLANK: blank, "chance": 0.5},
        meaning="Probability that a present overlooked object has a higher score than an absent "
        "class (AUC of the presence logit; without an instruction, of the cosine).",
    )


def _caption_row(measured: Measured, scores: Scores) -> Metric | None:
    row = _compared(
        measured,
        scores,
        _CAPTION,
        "all",
        name="Own caption among those of the same class (R@1)",
        meaning="These captions differ only in the object's appearance and place, so copying the "
        "instruction does not help.",
    )
    if row is None:
        return None
    return dataclasses.replace(
        row, baselines={**row.baselines, "chance": _caption_chance(measured)}
    )


def _compared(
    measured: Measured,
    scores: Scores,
    number: tuple[str, str, str],
    stratum: str,
    *,
    name: str,
    meaning: str,
) -> Metric | None:
    """A number with and without the instruction, and the interval of the difference; None without
    a query."""
    task, conditioned, metric = number
    values = _shares(scores, task, (conditioned, "static", "blank"), stratum, metric)
    if values is None:
        return None
    found = paired_interval(
        *(statistic(measured, task, one, metric, stratum) for one in (conditioned, "static")),
        measured.annotations.count,
    )
    gain = (
        f"{100 * found.value:+.1f} points against the same backbone {STATIC}, 95 % interval over "
        f"images {100 * found.low:+.1f} to {100 * found.high:+.1f}."
    )
    return Metric(
        name=name,
        value=values[0],
        baselines={STATIC: values[1], BLANK: values[2]},
        meaning=f"{meaning} {gain}",
    )


def _caption_chance(measured: Measured) -> float:
    """Probability that a random caption of the class is an own one, mean over the counted pairs."""
    notes = measured.annotations
    owner, classes = notes.captions.pair, notes.pairs.class_id
    own = np.bincount(owner, minlength=len(classes))
    of_class = np.bincount(classes[owner], minlength=len(notes.classes))[classes]
    counted = measured.tasks["same_class"]["conditioned"].first > 0
    return float((own[counted] / of_class[counted]).mean())


def _naming_row(scores: Scores) -> Metric | None:
    systems = ("conditioned", "copy_floor", "static")
    values = _shares(scores, "p_protocol", systems, "all", "acc@1")
    if values is None:
        return None
    return Metric(
        name="Naming what the instruction names",
        value=values[0],
        baselines={"copy floor": values[1], STATIC: values[2]},
        meaning="The instruction contains the answer: an image of one colour reaches the copy "
        "floor. Only what exceeds the floor comes from the image (P-protocol).",
    )


def _bars(scores: Scores) -> dict[str, list[Bar]]:
    auc = [scores.diagnostics[f"{one}_auc"] for one in ("oid", "static")]
    strata = ("salient", "overlooked")
    groups = {"Present or absent (AUC)": [[part[stratum] for part in auc] for stratum in strata]}
    for title, (task, system, metric) in _BARS.items():
        systems = (system, "static")
        groups[title] = [_shares(scores, task, systems, stratum, metric) for stratum in strata]
    bars = {
        title: [
            Bar(stratum, values[0], baselines={STATIC: values[1]})
            for stratum, values in zip(strata, found, strict=True)
            if values and None not in values
        ]
        for title, found in groups.items()
    }
    return {title: found for title, found in bars.items() if found}


def _add_scenes(page: Report, pictures: Pictures) -> None:
    scenes = pictures.scenes()
    if not scenes:
        return
    page.add_section(
        "Maps with and without the instruction",
        f"{len(scenes)} images drawn at random, each with instructions for objects that it shows "
        "and for one that is absent.",
    )
    page.add_text(
        "In pairs: the image and the attention of the unconditioned backbone; then for each "
        "instruction the relevance of each patch for the presence logit with the instruction, and "
        "for the cosine with the same words without it (gradient × attention; each map has its own "
        "scale, from dark, its lowest value, to bright, its highest). Below them the nearest of "
        "all captions with their cosines: ✓ belongs to that object in that image, ✗ to another."
    )
    page.add_image_rows(scenes, width=170)


def _add_overlooked(page: Report, pictures: Pictures, measured: Measured) -> None:
    notes = measured.annotations
    chosen = notes.pairs.within("overlooked")
    if not chosen.any():
        return
    logits = measured.presence[notes.pairs.image[chosen], notes.pairs.class_id[chosen]]
    absent = measured.presence[notes.labels == ABSENT]
    there, total = int(np.count_nonzero(logits > 0)), len(logits)
    found_of = f"{there:,} of {total:,} overlooked objects ({percent(there / total)})"
    text = f"The presence head finds {found_of}"
    if len(absent):
        alarms = int(np.count_nonzero(absent > 0))
        text += f" and reports {percent(alarms / len(absent))} of {len(absent):,} absent ones"
    sections.add_examples(
        page,
        "Overlooked objects: found and missed",
        f"{text}. Examples are drawn at random; the number is the probability of presence.",
        pictures.overlooked(),
        width=150,
    )


def _add_learning(page: Report, scores: Scores, history: History, evaluator: str) -> None:
    decisions = curves.decision_chart(history)
    charts = (
        decisions,
        curves.losses_chart(history),
        curves.deciding_chart(history, evaluator, scores.diagnostics["static_auc"]),
    )
    intro = _plateau_text(curves.plateau(history)) if decisions else ""
    sections.add_learning_curves(page, charts, intro)


def _plateau_text(found: curves.Plateau | None) -> str:
    text = (
        "Training starts on a plateau: adapters copy the instruction into the embedding of every "
        "image, and OID is at chance. Once they use the image, all losses fall."
    )
    rule = f"the mean of {curves.WINDOW} logged OID losses is at least 90 % of ln 2"
    if found is None:
        return f"{text} This run had no plateau ({rule})."
    if found.left:
        return f"{text} In this run the plateau ends at step {found.end:,} ({rule})."
    return f"{text} This run has not left it by step {found.end:,} ({rule}): train longer."


def _add_copying(page: Report, scores: Scores, history: History, evaluator: str) -> None:
    page.add_section(
        "Does the model use the image or copy the instruction?",
        "Adapters can take a shortcut and write the instruction's words into the embedding of any "
        "image. They do so as far as present and absent objects, or the image and an image of one "
        "colour, have the same scores.",
    )
    names = {"present": "present", "absent": "absent", "blank": "in an image of one colour"}
    found = {words: scores.diagnostics[f"cosine_{key}"] for key, words in names.items()}
    cosines = [f"{value:.2f} {words}" for words, value in found.items() if value is not None]
    text = f"At the end, the cosine with the object's name: {', '.join(cosines)}."
    named = [scores.p_protocol[name]["all"]["acc@1"] for name in ("conditioned", "copy_floor")]
    if None not in named:
        text += f" Named right: {100 * named[0]:.1f} %; the copy floor is {100 * named[1]:.1f} %."
    page.add_text(text)
    charts = (
        curves.cosines_chart(history),
        curves.evaluated_cosines_chart(history, evaluator),
        curves.naming_chart(history, evaluator),
    )
    for chart in filter(None, charts):
        page.add_chart(chart)


def _add_tables(page: Report, evaluated: Evaluated) -> None:
    page.add_section(
        "All numbers",
        "In percent; cosines and AUC as fractions; n is the number of queries. “Steered” is GiVE "
        "with the instruction, “static” the same backbone without one.",
    )
    for table in tables(evaluated.report):
        page.add_table(**table.to_dict())
    page.add_text(
        f"The column “paper” says {PAPER}: the paper's own numbers, protocols and code could not "
        "be had, and nothing is quoted from memory."
    )


def settings_rows(task: GiveTask, model: Give, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The main settings of a run as pairs (setting, value), in words."""
    blocks = model.backbone.vision.blocks
    losses, sampler = task.config.losses, config["sampler"]
    image, train = task.backbone.processor.image, config["train"]
    groups = "groups of one class" if sampler["grouped"] else "random groups"
    weights = ", ".join(f"{name.upper()} {getattr(losses, name):g}" for name in _LOSSES)
    return [
        ("backbone, frozen", task.backbone.name or "unnamed"),
        ("image", f"{image.size} × {image.size} pixels, {image.mode}"),
        (
            "adapters",
            f"{len(blocks.layers)}, in blocks {', '.join(str(k + 1) for k in blocks.layers)} of "
            f"{stack.depth_of(blocks)}, {blocks.inserts.heads} heads each",
        ),
        ("loss weights", weights + ("" if losses.absent_rows else "; OIIC without absent rows")),
        (
            "batch",
            f"{sampler['groups']} {groups} × {sampler['images']} images × 2 objects = "
            f"{train['batch_size']} rows, each also with an absent instruction",
        ),
        *sections.training_rows(train),
    ]


def _measured_rows(evaluated: Evaluated) -> list[tuple[str, str]]:
    cost, pairs = evaluated.cost, evaluated.report.num_pairs
    absent = evaluated.report.diagnostics["n_absent"]
    speed = ""
    if cost.ms_per_image is not None:
        speed = (
            f"; {cost.ms_per_image:.2f} ms for an image under an instruction, "
            f"{cost.images_per_second_per_chip:,.0f} of them a second on each of {cost.devices} "
            f"{'device' if cost.devices == 1 else 'devices'}"
        )
    return [
        (
            "test data",
            f"{evaluated.measured.annotations.count:,} images; {pairs['all']:,} present objects, "
            f"{pairs['overlooked']:,} of them overlooked; {absent:,} absent ones",
        ),
        ("cost of conditioning", f"{cost.added_parameters:,} added parameters{speed}"),
    ]
