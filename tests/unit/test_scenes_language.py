"""Claims about hand-placed objects, and the words that follow from them."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from perception_jax.data.records import Question
from perception_jax.data.scenes import captions, concepts, facts, language, phrases, questions
from perception_jax.data.scenes.facts import SceneFacts, observe
from perception_jax.data.scenes.language import describe
from perception_jax.data.scenes.referring import references
from perception_jax.data.scenes.spec import (
    Background,
    DrawnText,
    Placement,
    RenderedObject,
    SceneSpec,
)
from perception_jax.data.scenes.words import WORDS

PLAIN = Background(kind="flat", colours=("white",), seed=0)
Item = tuple[str, float, float, float]
"""Concept, centre (x, y) and side of a square box, in pixels of a 100 × 100 canvas."""


def _seen(
    *items: Item,
    background: Background = PLAIN,
    visible: float = 1.0,
    canvas: tuple[int, int] = (100, 100),
    **look: object,
) -> SceneFacts:
    height, width = canvas
    placements = [
        Placement(concept=name, style="noto", x=x / width, y=y / height, size=side / 100, **look)
        for name, x, y, side in items
    ]
    objects = [
        RenderedObject(
            placement=placement,
            box=(x - side / 2, y - side / 2, x + side / 2, y + side / 2),
            visible=visible,
        )
        for placement, (_, x, y, side) in zip(placements, items, strict=True)
    ]
    spec = SceneSpec(background=background, placements=tuple(placements))
    return observe(spec, objects, canvas=canvas, min_visible=0.5)


@pytest.mark.parametrize(
    ("side", "word"),
    [(0.05, "tiny"), (0.1, "small"), (0.3, "medium"), (0.6, "large"), (0.7, "huge")],
)
def test_size_words(side: float, word: str) -> None:
    assert facts.size_word(side) == word


def test_sizes_and_positions_of_a_wide_canvas_are_in_their_own_units() -> None:
    (item,) = _seen(("cat", 60, 50, 30), canvas=(100, 200)).objects
    assert (item.x, item.y, item.size) == (0.3, 0.5, "medium")
    assert (item.horizontal, item.vertical) == ("left", None)


def test_a_size_word_is_only_spoken_if_it_is_clear() -> None:
    clear, edge = _seen(("cat", 30, 50, 30), ("dog", 70, 50, 23)).objects
    assert (clear.plain_size, edge.plain_size) == ("medium", None)
    (hidden,) = _seen(("cat", 30, 50, 30), visible=0.6).objects
    assert (hidden.size, hidden.plain_size) == ("medium", None)


@pytest.mark.parametrize(
    ("x", "y", "claim"),
    [
        (70, 50, True),  # 40 to the right, no offset across
        (70, 85, True),  # 35 down is less than 40
        (70, 95, None),  # 45 down is more than 40
        (40, 50, None),  # 10 apart: closer than the margin
        (30, 80, False),  # same x
        (20, 50, False),
    ],
)
def test_left_of(x: float, y: float, claim: facts.Truth) -> None:
    first, second = _seen(("cat", 30, 50, 10), ("dog", x, y, 10)).objects
    assert facts.left_of(first, second) is claim


def test_above_mirrors_left_of_and_overlap_is_no_order() -> None:
    first, second = _seen(("cat", 50, 20, 10), ("dog", 50, 60, 10)).objects
    assert facts.above(first, second) is True
    assert facts.above(second, first) is False
    assert facts.relation(second, first) == "below"
    big, small = _seen(("cat", 40, 50, 60), ("dog", 58, 50, 10)).objects
    assert facts.left_of(big, small) is None


def test_bigger_needs_a_clear_ratio() -> None:
    big, middle, small = _seen(
        ("cat", 20, 20, 40), ("dog", 60, 60, 29), ("pig", 90, 90, 20)
    ).objects
    assert facts.bigger(big, middle) is True  # 1.38
    assert facts.bigger(small, middle) is False  # 1.45
    near = _seen(("cat", 20, 20, 40), ("dog", 60, 60, 31)).objects  # 1.29
    assert facts.bigger(*near) is None


def test_colours_that_people_confuse_are_not_told_apart() -> None:
    (item,) = _seen(("dog", 50, 50, 30), tint="red").objects
    claims = [facts.has_colour(item, colour) for colour in ("red", "orange", "blue")]
    assert claims == [True, None, False]


def test_hidden_and_far_things_are_neither_present_nor_absent() -> None:
    dog, cat, bus = (concepts.by_name(name) for name in ("dog", "cat", "bus"))
    hidden = _seen(("dog", 50, 50, 30), visible=0.3)
    assert hidden.objects == ()
    assert (hidden.count(dog), hidden.count(cat)) == (None, 0)
    assert hidden.count(concepts.by_name("poodle")) is None
    assert (hidden.count_category("animal"), hidden.count_category("vehicle")) == (None, 0)
    far = Placement(concept="oncoming bus", style="noto", x=0.5, y=0.5, size=0.3)
    collage = Background(kind="collage", colours=("red",), seed=0, placements=(far,))
    assert not _seen(("dog", 50, 50, 30), background=collage).absent(bus)


def test_kin_in_sight_leave_number_and_name_open() -> None:
    scene = _seen(("dog", 20, 50, 20), ("poodle", 60, 50, 20), ("cat", 85, 50, 20))
    assert scene.count(concepts.by_name("dog")) is None
    assert scene.count_category("animal") == 3
    dog, _, cat = _phrases(scene)
    assert "the cat" in cat
    assert "the dog" not in dog
    assert "the dog on the left" in dog


def test_rotation_takes_the_facing_away_and_flip_turns_it() -> None:
    name = next(c.name for c in concepts.concepts() if c.facing == "left")
    as_drawn, flipped, turned = (
        _seen((name, 50, 50, 30), **look).objects[0]
        for look in ({}, {"flip": True}, {"angle": 40.0})
    )
    assert [facts.faces(item, "left") for item in (as_drawn, flipped, turned)] == [
        True,
        False,
        None,
    ]


def _phrases(scene: SceneFacts) -> list[set[str]]:
    return [{ref.text for ref in found} for found in references(scene, random.Random(0))]


def test_references_use_the_name_alone_where_it_is_enough() -> None:
    cat, dog = _phrases(_seen(("cat", 20, 50, 20), ("dog", 80, 50, 20)))
    assert {text for text in cat if "cat" in text.split()[:2]} == {"the cat"}
    assert {"the animal on the left", "the thing to the left of the dog"} <= cat
    assert "the thing on the right" in dog


def test_references_to_one_of_several() -> None:
    scene = _seen(
        ("cat", 15, 50, 20), ("cat", 55, 50, 10), ("cat", 85, 50, 20), ("pig", 50, 80, 10)
    )
    first, second, third, pig = _phrases(scene)
    assert {"the cat on the left", "the leftmost cat"} <= first
    assert {"the smallest cat", "the second cat from the left", "the cat in the middle"} <= second
    assert "the rightmost cat" in third
    assert not any("smallest" in text for text in pig)


def test_no_reference_where_two_are_alike() -> None:
    assert _phrases(_seen(("cat", 47, 50, 20), ("cat", 53, 50, 20))) == [set(), set()]


def test_no_reference_by_name_beside_a_hidden_one_of_its_kin() -> None:
    far = Placement(concept="poodle", style="noto", x=0.5, y=0.5, size=0.3)
    collage = Background(kind="collage", colours=("red",), seed=0, placements=(far,))
    assert _phrases(_seen(("dog", 20, 50, 20), background=collage)) == [set()]


@pytest.mark.parametrize(
    ("noun", "phrase"),
    [("apple", "an apple"), ("hourglass", "an hourglass"), ("unicorn", "a unicorn")],
)
def test_articles(noun: str, phrase: str) -> None:
    assert phrases.indefinite(noun) == phrase


def test_lists_and_numbers() -> None:
    assert phrases.enumeration(["a cat"]) == "a cat"
    assert phrases.enumeration(["a cat", "two dogs", "a cup"]) == "a cat, two dogs and a cup"
    assert phrases.number_of(1, "ox", "oxen") == "an ox"
    assert phrases.number_of(3, "ox", "oxen") == "three oxen"


def test_sizes_and_colours_do_not_join_names_that_hold_them() -> None:
    (apple,) = _seen(("red apple", 50, 50, 30)).objects
    assert not phrases.colour_fits(apple)
    plane, small_plane = _seen(("airplane", 20, 20, 15), ("small airplane", 60, 60, 30)).objects
    assert (plane.plain_size, phrases.size_adjective(plane)) == ("small", None)
    assert phrases.size_adjective(small_plane) is None


def test_options_are_lettered() -> None:
    question = Question(
        text="Which?", answers=("right",), options=("left", "right"), kind="relation"
    )
    assert questions.prompt(question) == "Which? (a) left (b) right"
    assert questions.letter(question) == "(b)"
    assert questions.letter(Question(text="Which?", answers=("right",))) == ""


def test_a_scene_in_which_nothing_can_be_seen_is_described_by_its_background() -> None:
    said = describe(
        _seen(("dog", 50, 50, 30), visible=0.1), np.random.default_rng(0), concepts.concepts()
    )
    assert len(said.captions) == 1
    assert said.captions[0].endswith("of a plain white background")
    assert (said.object_captions, said.referring) == ((), ())
    assert "dog" not in said.absent


def test_a_written_name_is_not_called_absent() -> None:
    scene = _seen(("dog", 50, 50, 30))
    text = DrawnText(text="cat", x=0.5, y=0.9, size=0.1, colour="red")
    written = dataclasses.replace(scene, text=text)
    vocabulary = [concepts.by_name(name) for name in ("cat", "pig", "poodle")]
    assert describe(written, np.random.default_rng(0), vocabulary).absent == ("pig",)


def test_drawn_words_name_nothing() -> None:
    spoken = {
        word
        for concept in concepts.concepts()
        for name in (concept.name, concept.plural)
        for word in name.replace("-", " ").split()
    }
    assert not spoken & set(WORDS)
    assert len(WORDS) == len(set(WORDS)) > 50


def _stated(scene: SceneFacts) -> set[str]:
    """All facts that are stated of a scene, without "a photo of"."""
    said = {captions.fact_caption(scene, random.Random(k)) for k in range(200)}
    return {text.split(" of ", 1)[1] for text in said if text}


def test_a_fact_caption_states_one_certain_fact() -> None:
    (cat,) = (c for c in concepts.concepts() if c.name == "cat")
    scene = _seen(("cat", 20, 20, 16), ("cat", 80, 20, 16), ("dog", 20, 80, 16))
    said = _stated(scene)
    assert {"two cats", "three animals", "a cat at the top left", "a cat far away"} <= said
    assert not any("seen from" in text for text in said)  # of a cat there is one drawing only
    facing = {f"a cat facing {cat.facing}"} if cat.facing != "front" else set()
    assert {text for text in said if "a cat facing" in text} == facing
    assert any(text.endswith(("above a dog", "cat below a dog")) for text in said)
    assert all("close up" not in text for text in said)
    assert "a cat close up" in _stated(_seen(("cat", 50, 50, 80)))
    assert _stated(_seen()) == set()


def test_only_the_facts_language_has_a_fourth_caption() -> None:
    scene = _seen(("cat", 20, 20, 16))
    plain = language.caption(scene, np.random.default_rng(0)).captions
    more = language.caption(scene, np.random.default_rng(0), facts=True).captions
    assert len(plain) == 3
    assert more[:3] == plain
    assert len(more) == 4
