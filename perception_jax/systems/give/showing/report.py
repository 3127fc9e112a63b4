"""The report of a GiVE: one self-contained page, each number beside the backbone without steering.

What an instruction gives away is never shown alone: naming stands beside its copy floor, cosines of
present objects beside those of absent ones.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perception_jax.evals.conditioned.accumulate import Measured
from perception_jax.evals.conditioned.annotations import ABSENT
from perception_jax.evals.conditioned.bootstrap import paired_interval, statistic
from perception_jax.evals.conditioned.report import Report as Scores
from perception_jax.evals.conditioned.tables import PAPER, tables
from perception_jax.systems.give.evaluation.evaluate import Evaluated
from perception_jax.systems.give.showing import report_curves as curves
from perception_jax.systems.give.showing.report_pictures import Pictures, percent
from perception_jax.viz import Bar, Metric, Report, bar_chart

STATIC = "without an instruction"
"""What the unsteered backbone is called."""
BLANK = "an image of one colour"
"""What the copy floor of a number is called: all that the instruction alone gives."""
_DECIDING = ("l_protocol", "presence", "map")
_CAPTION = ("image_to_text", "conditioned", "same_class_r@1")
_RETRIEVAL = {
    "text_to_image": "Finding the image of a caption (R@1)",
    "image_to_image": "Finding another image with the object (R@1)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Story:
    """What a report tells beside its numbers.

    Attributes:
      title, subtitle: of the page.
      evaluator: name of the evaluation in `metrics.jsonl`.
      history: rows of `metrics.jsonl`; may be empty. Without "oid" nothing is said of a plateau.
      settings: (what, value) pairs, in words.
      config: all settings, shown folded at the end.
    """

    title: str
    subtitle: str
    evaluator: str
    history: curves.History
    settings: Sequence[tuple[str, str]]
    config: Mapping[str, Any]


def write(
    path: pathlib.Path, *, evaluated: Evaluated, pictures: Pictures | None, story: Story
) -> pathlib.Path:
    """Writes the page.

    Args:
      pictures: None leaves the sections with pictures out.

    Raises:
      PerceptionError: the file cannot be written.
    """
    page = Report(story.title, story.subtitle)
    _add_headline(page, evaluated, story)
    if pictures is not None:
        _add_scenes(page, pictures)
        _add_overlooked(page, pictures, evaluated.measured)
    _add_learning(page, evaluated.report, story)
    _add_copying(page, evaluated.report, story)
    _add_tables(page, evaluated)
    _add_settings(page, evaluated, story)
    return page.write(path)


def _add_headline(page: Report, evaluated: Evaluated, story: Story) -> None:
    page.add_section(
        "What an instruction changes",
        "The same backbone with an instruction (“the kite”) and without one. Overlooked are the "
        "objects that are not the largest of their image, or fill less than 2 % of it.",
    )
    found = curves.plateau(story.history)
    if found is not None and not found.left:
        page.add_text(
            "This run is too short: it has not left the plateau on which training begins, so it "
            "does not look yet. See “How it learned”."
        )
    measured, scores = evaluated.measured, evaluated.report
    rows = [
        _presence_row(scores),
        *(_deciding_row(measured, scores, stratum) for stratum in ("overlooked", "all")),
        _caption_row(measured, scores),
        _naming_row(scores),
    ]
    page.add_metrics([row for row in rows if row is not None])
    groups = _bars(scores)
    if groups:
        title = "The largest objects and the overlooked ones"
        page.add_chart(bar_chart(groups, title, percent=True, maximum=1.0))


def _presence_row(scores: Scores) -> Metric | None:
    systems = ("oid", "static", "blank")
    found, static, blank = (scores.diagnostics[f"{one}_auc"]["overlooked"] for one in systems)
    if found is None:
        return None
    return Metric(
        name="Overlooked objects: present or absent",
        value=found,
        baselines={STATIC: static, BLANK: blank, "chance": 0.5},
        meaning="Chance that an overlooked object that is there gets a higher score than one that "
        "is absent (AUC of the presence logit; without an instruction, of the cosine).",
    )


def _deciding_row(measured: Measured, scores: Scores, stratum: str) -> Metric | None:
    what = {"all": "All objects", "overlooked": "Overlooked objects"}[stratum]
    return _compared(
        measured,
        scores,
        _DECIDING,
        stratum,
        name=f"{what}: finding the images that show one (mAP)",
        meaning="For each name all images are ranked by how likely they show it (L-protocol).",
    )


def _caption_row(measured: Measured, scores: Scores) -> Metric | None:
    counted = scores.image_to_text and scores.image_to_text["conditioned"]["all"]["n_same_class"]
    if not counted:
        return None
    return _compared(
        measured,
        scores,
        _CAPTION,
        "all",
        name="Own caption among those of the same thing (R@1)",
        meaning="Only what the object looks like and where it is tells these captions apart, so "
        "copying the instruction earns nothing.",
        baselines={"chance": _caption_chance(measured)},
    )


def _compared(
    measured: Measured,
    scores: Scores,
    number: tuple[str, str, str],
    stratum: str,
    *,
    name: str,
    meaning: str,
    baselines: Mapping[str, float] | None = None,
) -> Metric | None:
    """A number steered and not, with the interval of the difference; None without a query."""
    task, steered, metric = number
    part = getattr(scores, task)
    values = [part[one][stratum][metric] for one in (steered, "static", "blank")]
    if None in values:
        return None
    found = paired_interval(
        *(statistic(measured, task, one, metric, stratum) for one in (steered, "static")),
        measured.annotations.count,
    )
    gain = (
        f"{found.value:+.1f} points against the same backbone {STATIC}, 95 % interval over images "
        f"{found.low:+.1f} to {found.high:+.1f}."
    )
    return Metric(
        name=name,
        value=values[0] / 100,
        baselines={STATIC: values[1] / 100, BLANK: values[2] / 100, **(baselines or {})},
        meaning=f"{meaning} {gain}",
    )


def _caption_chance(measured: Measured) -> float:
    """Chance to pick an own caption among those of the class, mean over the pairs that count."""
    notes = measured.annotations
    owner, kinds = notes.captions.pair, notes.pairs.class_id
    own = np.bincount(owner, minlength=len(kinds))
    of_class = np.bincount(kinds[owner], minlength=len(notes.classes))[kinds]
    counted = measured.tasks["same_class"]["conditioned"].first > 0
    return float((own[counted] / of_class[counted]).mean())


def _naming_row(scores: Scores) -> Metric | None:
    part = scores.p_protocol
    names = {"copy floor": "copy_floor", STATIC: "static"}
    values = {title: part[name]["all"]["acc@1"] for title, name in names.items()}
    if part["conditioned"]["all"]["acc@1"] is None:
        return None
    return Metric(
        name="Naming what the instruction names",
        value=part["conditioned"]["all"]["acc@1"] / 100,
        baselines={title: value / 100 for title, value in values.items()},
        meaning="The instruction gives the answer away: an image of one colour reaches the copy "
        "floor. Only what exceeds the floor comes from the image (P-protocol).",
    )


def _bars(scores: Scores) -> dict[str, list[Bar]]:
    groups = {
        "Present or absent (AUC)": {
            stratum: (scores.diagnostics["oid_auc"][stratum], static)
            for stratum, static in scores.diagnostics["static_auc"].items()
        },
        "Finding the images that show an object (mAP)": _by_stratum(scores, *_DECIDING),
        "Own caption among those of the same thing (R@1)": _by_stratum(scores, *_CAPTION),
    }
    for task, title in _RETRIEVAL.items():
        groups[title] = _by_stratum(scores, task, "conditioned", "r@1")
    bars = {
        title: [
            Bar(stratum, values[stratum][0], baselines={STATIC: values[stratum][1]})
            for stratum in ("salient", "overlooked")
            if None not in values.get(stratum, (None,))
        ]
        for title, values in groups.items()
    }
    return {title: found for title, found in bars.items() if found}


def _by_stratum(
    scores: Scores, task: str, steered: str, metric: str
) -> dict[str, tuple[float | None, float | None]]:
    """A number steered and not, as shares; {} if the task was left out."""
    part = getattr(scores, task)
    if part is None:
        return {}
    return {
        stratum: tuple(
            None if part[one][stratum][metric] is None else part[one][stratum][metric] / 100
            for one in (steered, "static")
        )
        for stratum in part[steered]
    }


def _add_scenes(page: Report, pictures: Pictures) -> None:
    scenes = pictures.scenes()
    if not scenes:
        return
    page.add_section(
        "Side by side",
        f"{len(scenes)} images drawn at random, each asked about things that it shows and one that "
        "it lacks.",
    )
    page.add_text(
        "In pairs: the image and the attention of the backbone alone; then for each instruction "
        "what speaks for the object's presence as steered, and what speaks for the same words "
        "without steering (gradient times attention; each map has its own scale, from dark, its "
        "lowest value, to bright, its highest). Under them the nearest of all captions with their "
        "cosines: ✓ is of that object in that image, ✗ is another's."
    )
    page.add_image_rows(scenes, width=170)


def _add_overlooked(page: Report, pictures: Pictures, measured: Measured) -> None:
    found, missed = pictures.overlooked()
    if not found and not missed:
        return
    notes = measured.annotations
    chosen = notes.pairs.within("overlooked")
    logits = measured.presence[notes.pairs.image[chosen], notes.pairs.class_id[chosen]]
    absent = measured.presence[notes.labels == ABSENT]
    there, total = int(np.count_nonzero(logits > 0)), len(logits)
    found_of = f"{there:,} of {total:,} overlooked objects ({percent(there / total)})"
    text = f"The presence head finds {found_of}"
    if len(absent):
        alarms = int(np.count_nonzero(absent > 0))
        text += f" and claims {percent(alarms / len(absent))} of {len(absent):,} absent ones"
    page.add_section(
        "Overlooked, found and missed",
        f"{text}. Drawn at random from both; the number is the probability of presence.",
    )
    for cards in (found, missed):
        if cards:
            page.add_images(cards, width=150)


def _add_learning(page: Report, scores: Scores, story: Story) -> None:
    history, found = story.history, curves.plateau(story.history)
    charts = (
        curves.decision_chart(history),
        curves.losses_chart(history),
        curves.deciding_chart(history, story.evaluator, scores.diagnostics["static_auc"]),
    )
    if not any(charts):
        return
    page.add_section("How it learned", _plateau_text(found) if charts[0] else "")
    for chart in filter(None, charts):
        page.add_chart(chart)


def _plateau_text(found: curves.Plateau | None) -> str:
    text = (
        "Training first sits on a plateau: steering copies the instruction into every image, and "
        "OID only guesses. Then it starts to look and all losses fall."
    )
    rule = f"counted while the mean of {curves.WINDOW} logged OID losses is at least 90 % of ln 2"
    if found is None:
        return f"{text} None was seen here ({rule})."
    if found.left:
        return f"{text} Here the plateau ends at step {found.end:,} ({rule})."
    return f"{text} This run has not left it by step {found.end:,} ({rule}): train longer."


def _add_copying(page: Report, scores: Scores, story: Story) -> None:
    seen, floor = scores.diagnostics, scores.p_protocol
    page.add_section(
        "Looking or copying",
        "The shortcut that steering can take is to write the instruction's words into any image. "
        "It has, as far as present and absent objects, or the image and one colour, score alike.",
    )
    kinds = {"present": "present", "absent": "absent", "blank": "in an image of one colour"}
    cosines = [
        f"{seen[f'cosine_{key}']:.2f} {words}"
        for key, words in kinds.items()
        if seen[f"cosine_{key}"] is not None
    ]
    text = f"At the end, the cosine with the object's name: {', '.join(cosines)}."
    named = [floor[name]["all"]["acc@1"] for name in ("conditioned", "copy_floor")]
    if None not in named:
        text += f" Named right: {named[0]:.1f} %, of which the copy floor has {named[1]:.1f} %."
    page.add_text(text)
    history = story.history
    charts = (
        curves.cosines_chart(history),
        curves.evaluated_cosines_chart(history, story.evaluator),
        curves.naming_chart(history, story.evaluator),
    )
    for chart in filter(None, charts):
        page.add_chart(chart)


def _add_tables(page: Report, evaluated: Evaluated) -> None:
    page.add_section(
        "All numbers",
        "In percent, cosines and AUC as plain numbers; n counts the queries. Steered is GiVE, "
        "static the same backbone without an instruction.",
    )
    for table in tables(evaluated.report):
        page.add_table(**table.to_dict())
    page.add_text(
        f"The column “paper” says {PAPER}: the paper's own numbers, protocols and code could not "
        "be had, and nothing is quoted from memory."
    )


def _add_settings(page: Report, evaluated: Evaluated, story: Story) -> None:
    page.add_section("How this was made")
    page.add_table(("what", "how"), [*story.settings, *_measured_rows(evaluated)])
    page.add_text(
        "One run with one seed: differences of a point or two may be luck. The maps say what moves "
        "a score, not where an object ends; the presence logit, not the map, is the decision."
    )
    page.add_details(story.config)


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
            "measured on",
            f"{evaluated.measured.annotations.count:,} images; {pairs['all']:,} present objects, "
            f"{pairs['overlooked']:,} of them overlooked; {absent:,} absent ones",
        ),
        ("cost of steering", f"{cost.added_parameters:,} added parameters{speed}"),
    ]
