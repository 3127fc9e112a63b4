"""Scores of a steered encoder: by hand, against a plain restatement, and block by block."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception_jax import viz
from perception_jax.data.records import ObjectAnnotation, ObjectInstruction, Record
from perception_jax.errors import ConfigError, DataError
from perception_jax.evals import intervals, ranking
from perception_jax.evals.conditioned import tables
from perception_jax.evals.conditioned.accumulate import Accumulator, Measured, TextEmbeddings
from perception_jax.evals.conditioned.annotations import (
    STRATA,
    Annotations,
    EvaluatedClass,
)
from perception_jax.evals.conditioned.results import results, statistic
from perception_jax.evals.ranking import area_under_curve

NAMES = ("traffic_light", "Bead_(jewelry)", "cup", "dog")
CLASSES = tuple(EvaluatedClass(name=n, frequency=f) for n, f in zip(NAMES, "rcfr", strict=True))


def thing(class_id: int, area: float | None = None, **more: object) -> ObjectAnnotation:
    box = None if area is None else (0.0, 0.0, area, 1.0)
    return ObjectAnnotation(name=NAMES[class_id], box=box, **more)


# --- Ranks --------------------------------------------------------------------------------------


def test_ties_go_to_the_smaller_index():
    scores = np.array([[0.5, -0.0, 0.5, 0.0, -1.0]], np.float32)
    assert np.argsort(ranking.order_keys(scores)[0]).tolist() == [0, 2, 1, 3, 4]
    right = np.array([[False, False, True, True, False]])
    assert ranking.first_ranks(scores, right).tolist() == [2]
    assert ranking.first_ranks(scores, right, np.array([[False, True, True, True, True]])) == [1]
    found = ranking.relevant_ranks(scores, right, np.array([[True, False, True, True, True]]))
    assert (found.rank.tolist(), found.item.tolist()) == ([2, 3], [2, 3])
    assert found.average_precision()[0] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found.r_precision().tolist() == [0.5]


def test_queries_without_right_or_without_wrong_items_are_skipped():
    scores = np.zeros((3, 2), np.float32)
    right = np.array([[False, False], [True, True], [False, True]])
    allowed = np.array([[True, True], [True, True], [False, True]])
    assert ranking.first_ranks(scores, right, allowed).tolist() == [0, 0, 0]
    found = ranking.relevant_ranks(scores, right, allowed)
    assert found.first().tolist() == [0, 0, 0]
    assert np.isnan(found.average_precision()).all()


def test_two_stages_reorder_the_best_only():
    coarse = np.array([[0.9, 0.1, 0.8, 0.7, 0.95]], np.float32)
    fine = np.array([[0.1, 0.9, 0.2, 0.3, 0.99]], np.float32)
    allowed = np.array([[True, True, True, True, False]])
    found = ranking.two_stage(coarse, fine, allowed, 2)
    order = np.argsort(ranking.order_keys(found)[0])
    assert order.tolist() == [2, 0, 3, 1, 4]  # 0 and 2 swap; 1 stays last of those allowed
    everything = ranking.two_stage(coarse, fine, allowed, 100)
    assert np.argsort(ranking.order_keys(everything)[0]).tolist() == [1, 3, 2, 0, 4]


def test_area_under_the_curve_counts_ties_half():
    assert area_under_curve(np.array([1.0, 2.0]), np.array([1.0, 0.0])) == (0.5 + 1 + 1 + 1) / 4
    assert area_under_curve(np.array([]), np.array([1.0])) is None


# --- A plain restatement ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class World:
    """Random data in which many scores tie: unit vectors with four coordinates of ±0.5."""

    federated: bool
    notes: Annotations
    texts: TextEmbeddings
    static: np.ndarray
    conditioned: np.ndarray  # [U, N, d]
    presence: np.ndarray  # [U, N]
    blank: np.ndarray  # [U, d]
    blank_presence: np.ndarray  # [U]


def make_world(seed: int, *, federated: bool, captions: bool, count: int = 9) -> World:
    rng = np.random.default_rng(seed)
    images = []
    for k in range(count):
        objects = [
            thing(
                int(rng.integers(4)),
                float(rng.integers(1, 60)),
                captions=tuple(f"text {k} {j} {n}" for n in range(rng.integers(3) * captions)),
            )
            for j in range(rng.integers(0, 4))
        ]
        lists = [tuple(NAMES[c] for c in np.flatnonzero(rng.random(4) < 0.4)) for _ in range(2)]
        images.append(
            Record(
                id=str(k),
                images=(np.zeros((2, 2, 3), np.uint8),),
                size=(40, 25),
                objects=tuple(objects),
                instructions=tuple(
                    ObjectInstruction(text="the odd one", target=j)
                    for j in range(len(objects))
                    if rng.random() < 0.2
                ),
                absent=lists[0],
                not_exhaustive=lists[1],
            )
        )
    notes = Annotations.build(images, CLASSES, federated=federated)

    def draw(*shape: int) -> np.ndarray:
        return rng.choice([-0.5, 0.5], (*shape, 4)).astype(np.float32)

    u, n = len(notes.instructions), notes.count
    return World(
        federated=federated,
        notes=notes,
        texts=TextEmbeddings(prototypes=draw(4), captions=draw(len(notes.captions.texts))),
        static=draw(n),
        conditioned=draw(u, n),
        presence=rng.integers(-2, 3, (u, n)).astype(np.float32),
        blank=draw(u),
        blank_presence=rng.integers(-2, 3, u).astype(np.float32),
    )


def measure(world: World, *, order: np.random.Generator | None = None) -> Measured:
    """All images in order, or only those needed, in a random order of instructions."""
    accumulator = Accumulator(world.notes, world.texts, world.static, top=3)
    made = accumulator.needs.made
    for u in (made if order is None else order.permutation(made)).tolist():
        chosen = np.arange(world.notes.count) if order is None else accumulator.needs.images[u]
        accumulator.add(
            u,
            chosen,
            world.conditioned[u, chosen],
            world.presence[u, chosen],
            world.blank[u],
            float(world.blank_presence[u]),
        )
    return accumulator.finish()


def plain(scores: list[float], right: list[bool], allowed: list[bool]) -> tuple[int, float]:
    """First rank and average precision, 0 and NaN if skipped."""
    order = sorted((k for k, a in enumerate(allowed) if a), key=lambda k: (-scores[k], k))
    hits = [right[k] for k in order]
    if not any(hits) or all(hits):
        return 0, float("nan")
    precisions = [sum(hits[: r + 1]) / (r + 1) for r in range(len(hits)) if hits[r]]
    return hits.index(True) + 1, sum(precisions) / len(precisions)


def means(outcomes: list[tuple[int, float]]) -> dict[str, float | None]:
    """R@1, R@5 and mAP."""
    firsts = [first for first, _ in outcomes if first]
    found = {f"r@{k}": [f <= k for f in firsts] for k in (1, 5)}
    found["map"] = [precision for first, precision in outcomes if first]
    return {name: sum(v) / len(v) if v else None for name, v in found.items()}


def restated(w: World, stratum: str) -> dict[str, dict[str, float | None]]:
    """Some of the numbers straight from their definitions, with loops."""
    notes, n = w.notes, range(w.notes.count)
    pairs, labels = notes.pairs, notes.labels
    table = list(zip(pairs.image.tolist(), pairs.class_id.tolist(), strict=True))
    chosen = set(np.flatnonzero(pairs.within(stratum)).tolist())
    kept = {table[p] for p in chosen}
    found: dict[str, dict[str, float | None]] = {}

    def dot(a: np.ndarray, b: np.ndarray) -> float:
        return float(a.astype(np.float64) @ b.astype(np.float64))

    image_text, same_class, image_image, named = [], [], [], []
    for p in sorted(chosen):
        (i, c), u = table[p], int(pairs.instruction[p])
        v, gallery = w.conditioned[u], range(len(w.texts.captions))
        of = [table[q] for q in notes.captions.pair]
        scores = [dot(v[i], t) for t in w.texts.captions]
        right = [of[k] == (i, c) for k in gallery]
        image_text.append(plain(scores, right, [True] * len(of)))
        same_class.append(plain(scores, right, [of[k][1] == c for k in gallery]))
        named.append(plain([dot(v[i], t) for t in w.texts.prototypes], np.arange(4) == c, [1] * 4))
        known = [j != i and labels[j, c] >= 0 for j in n]
        image_image.append(plain([dot(v[i], v[j]) for j in n], labels[:, c] == 1, known))
    found["named"] = means(named)
    found["image_to_image"] = means(image_image)
    if len(w.texts.captions):
        found["image_to_text"] = means(image_text)
        found["same_class"] = means(same_class)
        strict, relaxed = [], []
        for k, p in enumerate(notes.captions.pair.tolist()):
            if p in chosen:
                i, c = table[p]
                u = int(notes.captions.instruction[k])
                scores = [dot(w.texts.captions[k], w.conditioned[u, j]) for j in n]
                strict.append(plain(scores, [j == i for j in n], [True] * len(n)))
                relaxed.append(plain(scores, labels[:, c] == 1, labels[:, c] >= 0))
        found["text_to_image"] = means(strict) | {"map": means(relaxed)["map"]}
    by_class, by_blank, there, missing = [], [], [], []
    for c, u in enumerate(notes.class_instruction.tolist()):
        allowed = [(i, c) in kept or labels[i, c] == 0 for i in n]
        right = [(i, c) in kept for i in n]
        by_class.append(plain(w.presence[u].tolist(), right, allowed))
        by_blank.append(plain([0.0] * len(n), right, allowed))
        there += [w.blank_presence[u]] * sum(right)
        missing += [w.blank_presence[u]] * int(np.count_nonzero(labels[:, c] == 0))
    found["decided"], found["decided_blank"] = means(by_class), means(by_blank)
    above = [(a > b) + (a == b) / 2 for a in there for b in missing]
    found["blank_auc"] = np.mean(above) if above else None
    return found


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), federated=st.booleans(), captions=st.booleans())
def test_the_report_is_the_definition_in_any_order_of_galleries(seed, federated, captions):
    world = make_world(seed, federated=federated, captions=captions)
    measured = measure(world)
    found = results(measured)
    again = results(measure(world, order=np.random.default_rng(seed)))
    assert again.to_dict() == found.to_dict()
    for stratum in STRATA:
        expected = restated(world, stratum)
        close(found.p_protocol["conditioned"][stratum], {"acc@1": expected["named"]["r@1"]})
        for system, name in (("presence", "decided"), ("blank", "decided_blank")):
            close(found.l_protocol[system][stratum], {"map": expected[name]["map"]})
        close(found.diagnostics["blank_auc"], {stratum: expected["blank_auc"]})
        close(found.image_to_image["conditioned"][stratum], expected["image_to_image"])
        if len(world.texts.captions):
            texts = {k: v for k, v in expected["image_to_text"].items() if k != "map"}
            texts["same_class_r@1"] = expected["same_class"]["r@1"]
            close(found.image_to_text["conditioned"][stratum], texts)
            close(found.text_to_image["conditioned"][stratum], expected["text_to_image"])
        else:
            assert found.image_to_text is None


def close(found: dict[str, float | None], expected: dict[str, float | None]) -> None:
    for name, value in expected.items():
        assert found[name] == (None if value is None else pytest.approx(value, abs=1e-9)), name


def test_two_stages_with_every_image_are_the_conditioned_ranking():
    world = make_world(3, federated=False, captions=True)
    measured = measure(world)
    staged, full = (measured.tasks["text_to_image"][s] for s in ("two_stage", "conditioned"))
    assert staged.first.tolist() != full.first.tolist()
    accumulator = Accumulator(world.notes, world.texts, world.static, top=world.notes.count)
    for u in accumulator.needs.made.tolist():
        accumulator.add(
            u,
            np.arange(world.notes.count),
            world.conditioned[u],
            world.presence[u],
            world.blank[u],
        )
    for systems in accumulator.finish().tasks.values():
        if "two_stage" in systems:
            for name in ("first", "precision"):
                ours, theirs = (getattr(systems[s], name) for s in ("two_stage", "conditioned"))
                np.testing.assert_array_equal(ours, theirs)


def test_a_blank_text_query_is_decided_by_the_order_of_the_images():
    world = make_world(5, federated=False, captions=True)
    first = measure(world).tasks["text_to_image"]["blank"].first
    own = world.notes.pairs.image[world.notes.captions.pair]
    assert first.tolist() == (own + 1).tolist()


def test_galleries_that_are_missing_short_or_broken_are_refused():
    world = make_world(1, federated=False, captions=True)
    accumulator = Accumulator(world.notes, world.texts, world.static)
    v, d, blank = world.conditioned[0], world.presence[0], world.blank[0]
    with pytest.raises(DataError, match="all that Needs names; 2 of those are missing"):
        accumulator.add(0, np.arange(7), v[:7], d[:7], blank)
    with pytest.raises(DataError, match="presence logits, found 1 that"):
        accumulator.add(0, np.arange(9), v, np.where(np.arange(9) == 4, np.nan, d), blank)
    with pytest.raises(DataError, match="gallery 0"):
        accumulator.add(0, np.arange(9), np.zeros_like(v), d, blank)
    accumulator.add(0, np.arange(9), v, d, blank)
    with pytest.raises(DataError, match="found number 0"):
        accumulator.add(0, np.arange(9), v, d, blank)
    with pytest.raises(DataError, match="'the bead'"):
        accumulator.finish()


def test_without_retrieval_only_present_pairs_and_candidates_are_needed():
    world = make_world(2, federated=True, captions=True)
    lean = Accumulator(world.notes, world.texts, world.static, retrieval=False)
    whole = Accumulator(world.notes, world.texts, world.static)
    for c, u in enumerate(world.notes.class_instruction.tolist()):
        known = np.flatnonzero(world.notes.labels[:, c] >= 0)
        assert set(lean.needs.images[u]) <= set(known.tolist())
    assert sum(map(len, lean.needs.images)) < sum(map(len, whole.needs.images))
    for u in lean.needs.made.tolist():
        rows = lean.needs.images[u]
        asked = world.conditioned[u, rows], world.presence[u, rows]
        lean.add(u, rows, *asked, world.blank[u], float(world.blank_presence[u]))
    found, full = results(lean.finish()), results(measure(world))
    assert (found.text_to_image, found.image_to_image, found.two_stage) == (None, None, None)
    assert found.l_protocol == full.l_protocol
    assert found.diagnostics == full.diagnostics


# --- Intervals ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_weight_is_that_many_copies_of_an_image(seed):
    world = make_world(seed, federated=False, captions=True)
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 3, world.notes.count)
    weights[0] = max(1, weights[0])
    scores = rng.integers(0, 4, (world.notes.count, 4)).astype(np.float32)
    relevant, allowed = world.notes.relevant("all"), world.notes.allowed("all")
    copies = np.repeat(np.arange(world.notes.count), weights)
    for k in (None, 1, 5):
        ranked = intervals.ClassRanking(scores, relevant, allowed)
        found = intervals.ClassMean(ranked, k).under(weights[None].astype(np.float32))
        expected = means(
            [
                plain(scores[copies, c], relevant[copies, c], allowed[copies, c])
                for c in range(scores.shape[1])
            ]
        )["map" if k is None else f"r@{k}"]
        assert found[0] == pytest.approx(np.nan if expected is None else expected, nan_ok=True)


def test_every_number_of_the_report_can_be_resampled():
    for federated, captions in itertools.product((True, False), repeat=2):
        measured = measure(make_world(11, federated=federated, captions=captions, count=20))
        found = results(measured).to_dict()
        whole = np.ones((1, 20), np.float32)
        checked = 0
        for task in ("p_protocol", "l_protocol", "text_to_image", "image_to_text"):
            for system, by_stratum in found.get(task, {}).items():
                for stratum, scores in by_stratum.items():
                    for metric, value in scores.items():
                        if value is None or metric.startswith(("n", "ap")):
                            continue
                        one = statistic(measured, task, system, metric, stratum)
                        assert one.under(whole)[0] == pytest.approx(value), (task, metric)
                        checked += 1
        assert checked > 60
    with pytest.raises(ConfigError, match="'r@x'"):
        statistic(measured, "image_to_image", "static", "r@x")


def test_the_interval_of_a_difference():
    rng = np.random.default_rng(0)
    image = np.arange(200)
    better = intervals.QueryMean((rng.random(200) < 0.7).astype(float), image)
    worse = intervals.QueryMean((rng.random(200) < 0.4).astype(float), image)
    found = intervals.paired_interval(better, worse, 200)
    assert found.value == pytest.approx(better.values.mean() - worse.values.mean())
    assert 0 < found.low < found.value < found.high
    assert found.resamples == 1000
    # Of independent images: two standard errors to each side.
    spread = 2 * 1.96 * np.std(better.values - worse.values) / 200**0.5
    assert found.high - found.low == pytest.approx(spread, rel=0.1)
    same = intervals.paired_interval(better, better, 200)
    assert (same.low, same.high) == (0.0, 0.0)
    with pytest.raises(DataError, match="without any"):
        intervals.paired_interval(better, intervals.QueryMean(np.full(2, np.nan), image[:2]), 200)


# --- Tables -------------------------------------------------------------------------------------


def test_naming_never_stands_without_its_copy_floor_and_the_paper_is_unconfirmed():
    found = results(measure(make_world(4, federated=True, captions=True, count=20)))
    made = tables.tables(found)
    naming = made[0]
    assert naming.header == ("stratum", "metric", "n", "steered", "copy floor", "static", "paper")
    scores = found.p_protocol
    expected = [
        f"{100 * scores[s]['all']['acc@1']:.1f}" for s in ("conditioned", "copy_floor", "static")
    ]
    assert naming.rows[0] == ("all", "Acc@1", str(found.num_pairs["all"]), *expected, tables.PAPER)
    for table in made:
        assert all(row[-1] == "n/a (unconfirmed)" for row in table.rows)
        assert all(row[2] for row in table.rows)
        viz.Report("scores").add_table(**table.to_dict())
    titles = [table.title for table in made]
    assert titles[2:] == ["Text to image", "Image to text", "Image to image", "Copy diagnostics"]
    assert "two-stage, top 3" in made[2].header
    assert "mAP, r" in {row[1] for row in made[1].rows}
