"""What is said of scenes is true and unique, as an independent reading of the words judges it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from perception_jax.data.scenes import facts, questions
from perception_jax.data.scenes.language import Description, describe
from perception_jax.data.scenes.sample import SceneConfig, sample_spec
from perception_jax.data.scenes.source import draw_scene
from perception_jax.data.scenes.spec import RenderedObject, SceneSpec
from perception_jax.data.scenes.visibility import extent
from tests import scenes_oracle as oracle

SCENES = 300
CONFIGS = {
    "train": SceneConfig(canvas=64, repeat=0.4, text=0.3),
    "test": SceneConfig(canvas=(64, 96), split="test", count=(2, 8), tint=0.4),
    "held out": SceneConfig(canvas=64, split="held_out", count=(1, 4)),
}
Described = tuple[Description, oracle.Scene]


def _described(config: SceneConfig, seed: int) -> Described:
    rng = np.random.default_rng([seed, 77])
    spec, rendered = draw_scene(rng, config)
    observed = facts.observe(
        spec, rendered.objects, canvas=config.shape, min_visible=config.min_visible
    )
    scene = oracle.scene_of(spec, rendered.objects, config.shape)
    return describe(observed, rng, config.vocabulary()), scene


@pytest.fixture(scope="module", params=CONFIGS)
def described(request: pytest.FixtureRequest) -> list[Described]:
    """A hundred described scenes of each split."""
    return [_described(CONFIGS[request.param], seed) for seed in range(SCENES // len(CONFIGS))]


def test_a_referring_expression_picks_exactly_one_object(described: list[Described]) -> None:
    for said, scene in described:
        for phrase in said.referring:
            assert oracle.meant_by(phrase.text, scene) == [phrase.target], phrase


def test_most_objects_have_a_referring_expression(described: list[Described]) -> None:
    """Also most of those whose name alone is ambiguous."""
    shared = [
        k in {phrase.target for phrase in said.referring}
        for said, scene in described
        for k, thing in enumerate(scene.things)
        if sum(other.name == thing.name for other in scene.things) > 1
    ]
    assert len(shared) > 10
    assert np.mean(shared) > 0.8


def test_captions_are_true_of_the_image(described: list[Described]) -> None:
    for said, scene in described:
        assert len(said.captions) == 3
        for caption in said.captions:
            oracle.check_caption(caption, scene)
            assert 3 <= len(caption.split()) <= 32, caption


def test_object_captions_are_true_and_one_omits_the_name(described: list[Described]) -> None:
    for said, scene in described:
        for (named, unnamed), thing in zip(said.object_captions, scene.things, strict=True):
            oracle.check_object_caption(named, thing)
            oracle.check_object_caption(unnamed, thing)
            assert _has_phrase(named, thing.name)
            assert not _has_phrase(unnamed, thing.name)


def test_the_last_caption_has_no_class_name(described: list[Described]) -> None:
    for said, scene in described:
        for name in {thing.name for thing in scene.things}:
            assert not _has_phrase(said.captions[-1], name)
            assert not _has_phrase(said.captions[-1], oracle.TABLE[name]["plural"])


def test_answers_are_right(described: list[Described]) -> None:
    kinds = Counter()
    for said, scene in described:
        for question in said.questions:
            oracle.check_question(question, scene)
            kinds[question.kind] += 1
    assert set(kinds) >= {"presence", "count", "colour", "size", "position", "relation", "name"}


def test_instructions_point_at_one_object_or_at_none(described: list[Described]) -> None:
    for said, scene in described:
        for instruction in said.instructions:
            phrase = re.sub(r"^(a photo of |focus on )?(the )?", "the ", instruction.text)
            if instruction.target is None:
                assert _is_absent(phrase.removeprefix("the "), scene), instruction
            else:
                assert oracle.meant_by(phrase, scene) == [instruction.target], instruction
        assert None in {instruction.target for instruction in said.instructions}


def test_absent_names_have_no_relative_in_the_image(described: list[Described]) -> None:
    for said, scene in described:
        assert len(said.absent) == len(set(said.absent)) > 0
        for name in said.absent:
            assert _is_absent(name, scene), name


def test_english_is_well_formed(described: list[Described]) -> None:
    for said, _ in described:
        for text in _texts(said):
            assert text == text.strip()
            assert "  " not in text
            assert "None" not in text
            assert not re.search(r"\b(\w+) \1\b", text), text
            for article, word in re.findall(r"\b(an?) ([\w-]+)", text):
                sounds_open = word[0] in "aeiou" and not re.match("uni|one", word)
                assert (article == "an") == (sounds_open or word.startswith("hourglass")), text
        for question in said.questions:
            assert re.fullmatch(r"[A-Z].*\?", question.text)


def test_same_scene_and_generator_give_the_same_words() -> None:
    config = CONFIGS["train"]
    assert [_described(config, seed)[0] for seed in range(20)] == [
        _described(config, seed)[0] for seed in range(20)
    ]


def test_no_answer_is_right_in_most_questions_of_its_kind(unchecked: None) -> None:
    """Over 2,000 scenes, without drawing them: nothing is covered in these."""
    config = SceneConfig(canvas=64, text=0.5)
    answers, letters = defaultdict(Counter), defaultdict(Counter)
    for seed in range(2000):
        rng = np.random.default_rng([seed, 78])
        spec = sample_spec(rng, config)
        observed = facts.observe(spec, _uncovered(spec, 64), canvas=(64, 64), min_visible=0.5)
        for question in describe(observed, rng, config.vocabulary()).questions:
            answers[question.kind][question.answer] += 1
            if question.options:
                letters[question.kind][questions.letter(question)] += 1
    assert set(answers) == set(questions.KINDS)
    for kind, counts in answers.items():
        assert counts.total() > 200, kind
        for table in (counts, letters[kind]):
            assert max(table.values()) < 0.6 * table.total(), (kind, table.most_common(2))


def _uncovered(spec: SceneSpec, side: int) -> list[RenderedObject]:
    """Objects as the renderer would report them if none covered another."""
    shown = []
    for placement in spec.placements:
        half_x, half_y = (length / 2 for length in extent(placement))
        x, y = placement.x, placement.y
        corners = (x - half_x, y - half_y, x + half_x, y + half_y)
        box = tuple(side * corner for corner in corners)
        shown.append(RenderedObject(placement=placement, box=box, visible=1.0))
    return shown


def _has_phrase(text: str, name: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) is not None


def _is_absent(name: str, scene: oracle.Scene) -> bool:
    kin = oracle.TABLE[name]["kin"]
    return kin not in [*scene.faint, *(thing.kin for thing in scene.things)]


def _texts(said: Description) -> list[str]:
    return [
        *said.captions,
        *(caption for pair in said.object_captions for caption in pair),
        *(phrase.text for phrase in said.referring),
        *(questions.prompt(question) for question in said.questions),
        *(question.answer for question in said.questions),
        *(instruction.text for instruction in said.instructions),
        *said.absent,
    ]
