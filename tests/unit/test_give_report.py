"""GiVE's report: what its curves, comparisons and pictures say, against numbers counted by hand."""

from __future__ import annotations

import collections
import dataclasses
import html
import math
import re

import numpy as np
import pytest

from perception_jax.api import Loaded
from perception_jax.data.records import ObjectAnnotation, Record
from perception_jax.evals.conditioned.tables import tables
from perception_jax.systems.give.adapter import AdapterConfig
from perception_jax.systems.give.encode import ConditionedEncoder
from perception_jax.systems.give.evaluation.benchmark import evaluation_of
from perception_jax.systems.give.evaluation.evaluate import Evaluated, EvaluationConfig
from perception_jax.systems.give.model import GiveConfig
from perception_jax.systems.give.pretrained import GiveEncoder
from perception_jax.systems.give.report import curves
from perception_jax.systems.give.report import page as report_page
from perception_jax.systems.give.report import pictures as report_pictures
from perception_jax.systems.give.report.page import write
from perception_jax.systems.give.report.pictures import Pictures
from perception_jax.viz.formatting import format_number
from perception_jax.viz.sheet import PANEL
from tests import tiny_give

NAMES = ("kite", "dog", "sock", "cup")
SIDE = tiny_give.SIDE
COIN = math.log(2)


def oid(*losses: float, every: int = 10) -> list[dict]:
    return [{"step": every * (k + 1), "oid": loss} for k, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([], None),
        ([0.5, 0.4, 0.3], None),
        ([COIN] * 4, curves.Plateau(end=40, left=False)),
        # Means of up to five: 0.69 … 0.69, then 0.57 at the seventh.
        ([COIN] * 5 + [0.4, 0.3, 0.2], curves.Plateau(end=60, left=True)),
        # One low value is luck: the mean stays above.
        ([COIN] * 5 + [0.5] + [COIN] * 4, curves.Plateau(end=100, left=False)),
    ],
)
def test_the_plateau_ends_where_the_mean_loss_leaves_guessing(losses, found):
    assert curves.plateau(oid(*losses)) == found


def test_the_chart_of_decisions_shows_the_plateau_and_its_end():
    left = curves.decision_chart(oid(*[COIN] * 5, 0.4, 0.3, 0.2))
    assert "on the plateau, to step 60" in left
    assert "after the plateau" in left
    stuck = curves.decision_chart(oid(*[COIN] * 4))
    assert "on the plateau, to step 40" in stuck
    assert "after the plateau" not in stuck
    assert "plateau" not in curves.decision_chart(oid(0.5, 0.4))
    assert curves.decision_chart([]) is None


def test_a_lone_evaluation_is_no_curve():
    key = "evaluate/test/p_acc1_conditioned"
    once, twice = [{"step": 10, key: 0.4}], [{"step": 10, key: 0.4}, {"step": 20, key: 0.5}]
    assert curves.naming_chart(once, "test") is None
    assert curves.naming_chart(twice, "other") is None
    assert "50 %" in curves.naming_chart(twice, "test")


def record(number: int) -> Record:
    """A large and a small thing, and one that nobody asks about but that tells the images apart;
    the next thing is known to be absent, of the last nothing is known."""
    rng = np.random.default_rng(number)
    kinds = [NAMES[(number + k) % len(NAMES)] for k in range(3)]
    large, small = (0.0, 0.0, 12.0, 12.0), (12.0, 10.0, 16.0, 14.0)
    return Record(
        id=f"image {number}",
        images=(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8),),
        objects=(
            ObjectAnnotation(name=kinds[0], box=large, captions=(f"large {kinds[0]} of {number}",)),
            ObjectAnnotation(name=kinds[1], box=small, captions=(f"small {kinds[1]} of {number}",)),
            ObjectAnnotation(name=f"thing {number}", box=None),
        ),
        absent=(kinds[2],),
        size=(SIDE, SIDE),
    )


RECORDS = [record(number) for number in range(10)]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return tiny_give.tiny_clip()


@pytest.fixture(scope="module")
def encoder(loaded) -> GiveEncoder:
    config = GiveConfig(layers=tiny_give.LAYERS, adapter=AdapterConfig(heads=4))
    return GiveEncoder(tiny_give.with_adapters(loaded, config), loaded)


@pytest.fixture(scope="module")
def evaluated(encoder) -> Evaluated:
    """With a presence head that says yes and no equally often."""
    evaluation = evaluation_of(
        RECORDS,
        encoder.processor,
        classes=NAMES,
        federated=True,
        config=EvaluationConfig(batch_size=8),
        in_memory=True,
    )
    logits = evaluation.run(encoder.model).measured.presence
    encoder.model.oid_head.fc2.bias[...] -= np.nanmedian(logits)
    return evaluation.run(encoder.model)


@pytest.fixture(scope="module")
def presence(evaluated) -> np.ndarray:
    """Probability of each name in each image; NaN where nobody knows."""
    return 1 / (1 + np.exp(-evaluated.measured.presence))


@pytest.fixture(scope="module")
def pictures(encoder, evaluated) -> Pictures:
    return Pictures(
        encoder.model, ConditionedEncoder(encoder.processor), RECORDS, evaluated.measured
    )


def shown_in(cards) -> int:
    """The number of the image that a scene's cards are of."""
    return int(cards[0].caption.rsplit(" ", 1)[1])


def test_a_scene_is_shown_in_pairs_with_the_models_own_decisions(pictures, presence):
    scenes = pictures.scenes()
    assert len(scenes) == report_pictures.SCENES
    wrong = 0
    for cards in scenes:
        number = shown_in(cards)
        shown = [item.name for item in RECORDS[number].objects]
        assert len(cards) == 2 + 2 * 3  # two things that it shows, one that it lacks
        for steered, static in zip(cards[2::2], cards[3::2], strict=True):
            name = re.match("“the (.*)”: (present|absent), (.*%)\n", steered.caption)
            chance = presence[number, NAMES.index(name[1])]
            assert name[3] == f"{100 * chance:.0f} %"
            assert name[2] == ("present" if chance > 0.5 else "absent")
            right = (chance > 0.5) == (name[1] in shown)
            assert steered.status == ("ok" if right else "wrong")
            wrong += not right
            assert static.caption.startswith(f"“the {name[1]}”, unconditioned")
            assert ("with a higher score" in static.caption) == (name[1] in shown)
        assert np.any(cards[2].image != cards[4].image)
    assert 0 < wrong < 3 * len(scenes)


def test_nearest_captions_are_marked_by_whose_they_are(encoder, pictures, monkeypatch):
    monkeypatch.setattr(report_pictures, "CAPTIONS", 12)
    texts = [item.caption for one in RECORDS for item in one.objects[:2]]
    rows, told = encoder.texts(texts), encoder.instructions([f"the {name}" for name in NAMES])
    seen = set()
    for cards in pictures.scenes():
        one = RECORDS[shown_in(cards)]
        fits = encoder.encode([one.image] * len(NAMES), told).embedding @ rows.T
        for card in cards[2::2]:
            name = card.caption.split("”")[0].removeprefix("“the ")
            cosines = np.asarray(fits[NAMES.index(name)])
            own = {item.caption for item in one.objects if item.name == name}
            best = np.argsort(-cosines)[: report_pictures.CAPTIONS]
            marks = ["✓" if texts[k] in own else "✗" for k in best]
            assert card.caption.split("\n")[1:] == [
                f"{mark} {texts[k]}, {cosines[k]:.2f}" for mark, k in zip(marks, best, strict=True)
            ]
            seen.update(marks)
    assert seen == {"✓", "✗"}


def test_overlooked_objects_are_found_or_missed(pictures, presence, evaluated):
    found, missed = pictures.overlooked()
    small = [presence[k, NAMES.index(one.objects[1].name)] for k, one in enumerate(RECORDS)]
    there = sum(chance > 0.5 for chance in small)
    assert len(found) == min(report_pictures.OVERLOOKED, there) > 0
    assert len(missed) == min(report_pictures.OVERLOOKED, len(small) - there) > 0
    assert {card.status for card in found} == {"ok"}
    assert {card.status for card in missed} == {"wrong"}
    expected = collections.Counter()
    for number, one in enumerate(RECORDS):
        own, absent = (NAMES.index(name) for name in (one.objects[1].name, *one.absent))
        steered, static = (
            int(scores[number, absent] > scores[number, own])
            for scores in (evaluated.measured.presence, evaluated.measured.static)
        )
        said = (
            f"Absent classes with a higher score: {steered} of 1; without an instruction {static}"
        )
        expected[f"{NAMES[own]}: {100 * presence[number, own]:.0f} %\n{said}"] += 1
    assert collections.Counter(card.caption for card in [*found, *missed]) <= expected


def test_a_box_lies_over_its_object(pictures):
    one = RECORDS[0]
    view = pictures._view(one.image)
    changed = (report_pictures._boxed(view, one, [1], named=False) != view.picture).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    scale = PANEL / SIDE
    assert (columns[0], rows[0]) == (12 * scale, 10 * scale)
    assert (columns[-1], rows[-1]) == (16 * scale - 1, 14 * scale - 1)


def page(tmp_path, evaluated, pictures, history=()) -> str:
    path = write(
        tmp_path / "report.html",
        evaluated=evaluated,
        pictures=pictures,
        evaluator="test",
        history=history,
        settings=[("seed", "0")],
        config={"steps": 3},
        title="A title",
        subtitle="",
    )
    return html.unescape(path.read_text())


def metric(text: str, name: str) -> tuple[str, list[str]]:
    """Value and baselines of a row of the headline, as shown."""
    row = text[text.index(f"<dt>{name}</dt>") :].partition("</ul>")[0]
    value = re.search('<dd class="value">(.*?)</dd>', row)[1]
    return value, re.findall("<li>(.*?)</li>", row)


def test_no_number_stands_without_what_it_is_compared_to(tmp_path, evaluated, pictures):
    scores, text = evaluated.report, page(tmp_path, evaluated, pictures)

    def shown(share: float) -> str:
        return format_number(share, percent=True)

    def rate(part, *path: str) -> str:
        for key in path:
            part = part[key]
        return shown(part)

    found = scores.diagnostics
    assert metric(text, "Overlooked objects: present or absent") == (
        shown(found["oid_auc"]["overlooked"]),
        [
            f"without an instruction {shown(found['static_auc']['overlooked'])}",
            f"an image of one colour {shown(found['blank_auc']['overlooked'])}",
            "chance 50 %",
        ],
    )
    for what, stratum in (("Overlooked", "overlooked"), ("All", "all")):
        steered, static, blank = (
            scores.l_protocol[s][stratum]["map"] for s in ("presence", "static", "blank")
        )
        assert metric(text, f"{what} objects: finding the images that show one (mAP)") == (
            shown(steered),
            [
                f"without an instruction {shown(static)}",
                f"an image of one colour {shown(blank)}",
            ],
        )
        assert f"{100 * (steered - static):+.1f} points against the same backbone" in text
    value, baselines = metric(text, "Own caption among those of the same class (R@1)")
    assert value == rate(scores.image_to_text, "conditioned", "all", "same_class_r@1")
    assert baselines[0].endswith(rate(scores.image_to_text, "static", "all", "same_class_r@1"))
    naming = scores.p_protocol
    assert metric(text, "Naming what the instruction names") == (
        rate(naming, "conditioned", "all", "acc@1"),
        [
            f"copy floor {rate(naming, 'copy_floor', 'all', 'acc@1')}",
            f"without an instruction {rate(naming, 'static', 'all', 'acc@1')}",
        ],
    )
    assert text.count("n/a (unconfirmed)") > len(tables(scores))
    assert all(table.title in text for table in tables(scores))


def test_the_page_leaves_out_what_there_is_not(tmp_path, evaluated, pictures):
    sections = (
        "Maps with and without the instruction",
        "Overlooked objects: found and missed",
        "Learning curves",
    )
    plain = page(tmp_path, evaluated, None)
    assert not any(title in plain for title in sections)
    key = "evaluate/test/oid_auc_all"
    history = [*oid(*[COIN] * 3), {"step": 10, key: 0.5}, {"step": 20, key: 0.6}]
    full = page(tmp_path, evaluated, pictures, history)
    assert all(f"<h2>{title}</h2>" in full for title in sections)
    assert "This run is too short" in full
    assert "has not left it by step 30" in full


def test_records_without_boxes_or_rival_captions_have_a_page_too(tmp_path, encoder):
    """One thing in each image, of a kind of its own: nothing is overlooked, no caption is hard."""
    records = [
        dataclasses.replace(
            one,
            objects=(ObjectAnnotation(name=name, box=None, captions=(f"a {name}",)),),
            absent=(),
            extras={},
        )
        for name, one in zip(NAMES, RECORDS, strict=False)
    ]
    evaluation = evaluation_of(
        records, encoder.processor, classes=NAMES, federated=False, in_memory=True
    )
    evaluated = evaluation.run(encoder.model)
    pictures = Pictures(
        encoder.model, ConditionedEncoder(encoder.processor), records, evaluated.measured
    )
    text = page(tmp_path, evaluated, pictures)
    assert "Maps with and without the instruction" in text
    assert "All objects: finding the images that show one (mAP)" in text
    for missing in ("Overlooked objects", "found and missed", "Own caption", "Learning curves"):
        assert missing not in text


def test_captions_are_guessed_as_often_as_their_class_has_others(evaluated):
    """Each name is large once and small once in four images; ten images have twenty captions."""
    classes = [item.name for one in RECORDS for item in one.objects[:2]]
    expected = np.mean([1 / classes.count(name) for name in classes])
    assert report_page._caption_chance(evaluated.measured) == pytest.approx(expected)
