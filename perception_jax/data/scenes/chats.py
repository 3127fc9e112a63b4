"""Conversations about scenes: captions, questions, and questions about minimal pairs.

What a small model that reads images trains on and is tested with. A question with two options asks
for its letter or for its words.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import numpy as np

from perception_jax.data.records import MMVP_PATTERNS, MinimalPair, Question, Record, Turn
from perception_jax.data.scenes import concepts, objects, questions
from perception_jax.data.scenes.pairs import PairSource
from perception_jax.data.scenes.sample import SceneConfig
from perception_jax.data.scenes.source import ScenesSource
from perception_jax.errors import ConfigError

CAPTIONS = ("<image>\nDescribe the picture.", "<image>\nDescribe the picture in detail.")
"""The instructions for a caption and for a detailed one."""
LETTER = "Which letter?"
"""What is added to a question whose answer is the letter of an option."""
IMAGE = "<image>\n"
"""Where the image stands in the first turn."""

NAMING = frozenset({"presence", "count", "name", "category"})
"""Kinds of questions about which things there are, which any question about a thing gives away."""

_NAMES = "Which things does this caption name? {}"
_CYCLE = 8
_ANSWERED = {
    "orientation": {"facing"},
    "position": {"position", "relation"},
    "colour": {"colour"},
    "text": {"text"},
}
"""Kinds of questions that the question of a minimal pair may answer, by its pattern."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig:
    """Settings of conversations about scenes.

    Attributes:
      canvas: side of the images, pixels.
      split: "train", or "test" for the drawings of the artist that never trains.
      objects: most objects of a scene.
      names: concepts that are drawn, spread over the table, and all that are drawn in two states or
        from two sides; 0 for all.
      caption: share of the conversations that begin with a caption. In others the first question
        is answered without one, as a model is asked that has learned them.
      detailed: share of these captions that say more than names.
      turns: most questions of a conversation, drawn from those of the scene.
      independent: whether no turn gives the answer to a later one away, which a model then finds
        in the text and does not learn to see. Only the first question may be one of `NAMING`; a
        plain caption takes its place, nothing follows a detailed one, and conversations about pairs
        have none.
      text_every: each so many-th conversation is about a caption alone; 0 for none.
      pairs: of eight conversations, how many are about an image of a minimal pair.
      letters: share of the questions with two options that ask for a letter.

    Raises:
      ConfigError: a number out of its range.
    """

    canvas: int = 48
    split: str = "train"
    objects: int = 4
    names: int = 0
    caption: float = 1.0
    detailed: float = 0.0
    turns: int = 2
    independent: bool = False
    text_every: int = 8
    pairs: int = 0
    letters: float = 0.0

    def __post_init__(self) -> None:
        rules = {
            "a caption in each or turns >= 1": self.turns >= (0 if self.caption == 1 else 1),
            "names >= 0": self.names >= 0,
            "text_every >= 0": self.text_every >= 0,
            f"0 <= pairs <= {_CYCLE}": 0 <= self.pairs <= _CYCLE,
            "0 <= caption <= 1": 0 <= self.caption <= 1,
            "0 <= letters <= 1": 0 <= self.letters <= 1,
            "0 <= detailed <= 1": 0 <= self.detailed <= 1,
        }
        if broken := [rule for rule, holds in rules.items() if not holds]:
            raise ConfigError(f"ChatConfig: expected {'; '.join(broken)}; found {self}.")

    def scenes(self) -> SceneConfig:
        """The settings of the scenes themselves."""
        chosen: set[str] = set()
        if self.names:
            twofold = (one.name for one in concepts.concepts(held_out=False) if one.counterpart)
            chosen = {*objects.names(self.names), *twofold}
        return SceneConfig(
            canvas=self.canvas,
            split=self.split,
            names=tuple(sorted(chosen)),
            count=(1, self.objects),
        )


class SceneConversations:
    """Random access to conversations about scenes; see `data.records.Source`.

    The records' `questions` are those that are asked, in order.
    """

    def __init__(self, config: ChatConfig, *, seed: int, length: int) -> None:
        """Draws nothing yet. Args: seed: of the scenes. Raises `ConfigError` as the scenes."""
        self._config = config
        self._scenes = _Scenes(config, seed=seed, length=length)

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Record:
        config = self._config
        scene, of_pair, draw = self._scenes[index]
        if config.text_every and index % config.text_every == config.text_every - 1:
            names = sorted({one.name for one in scene.objects})
            said = [(_NAMES.format(scene.captions[0]), ", ".join(names))]
            return Record(id=scene.id, conversation=_turns(said))
        if config.independent:
            caption = None if of_pair else _caption(config, draw)
            asked = _independent(scene, of_pair, caption, config.turns, draw)
            said = _all_said(asked, config.letters, draw)
        else:
            asked = _any(scene, of_pair, config.turns, draw)
            said = _all_said(asked, config.letters, draw)
            caption = _caption(config, draw)
        if caption is not None:
            said.insert(0, (CAPTIONS[caption], scene.captions[caption]))
        else:
            said[0] = (IMAGE + said[0][0], said[0][1])
        return Record(
            id=scene.id,
            images=scene.images,
            questions=tuple(asked),
            conversation=_turns(said),
        )


class SingleQuestions:
    """Questions about the scenes of conversations, of any kind, each as a record of its own.

    Every scene gives `each` records; one with fewer questions repeats them.
    """

    def __init__(self, config: ChatConfig, *, seed: int, length: int, each: int) -> None:
        """Draws nothing yet.

        Args:
          seed, length: of the scenes, see `SceneConversations`.
          each: questions about a scene.

        Raises:
          ConfigError: fewer than one question.
        """
        if each < 1:
            raise ConfigError(f"SingleQuestions: expected at least 1 of each scene, found {each}.")
        self._scenes = _Scenes(config, seed=seed, length=length)
        self._letters, self._each = config.letters, each

    def __len__(self) -> int:
        return len(self._scenes) * self._each

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"question {index} of {len(self)}")
        place = index % self._each
        scene, of_pair, draw = self._scenes[index // self._each]
        asked = _any(scene, of_pair, self._each, draw)
        said = _all_said(asked, self._letters, draw)
        question, answer = said[place % len(asked)]
        return Record(
            id=f"{scene.id}-{place}",
            images=scene.images,
            questions=(asked[place % len(asked)],),
            conversation=_turns([(IMAGE + question, answer)]),
        )


class _Scenes:
    """Scenes and images of minimal pairs, with the pair's question and a generator for the rest."""

    def __init__(self, config: ChatConfig, *, seed: int, length: int) -> None:
        self._seed, self._each = seed, config.pairs
        self._scenes = ScenesSource(config.scenes(), seed=seed, length=length)
        self._pairs = PairSource(config.scenes(), seed=seed, length=length) if config.pairs else ()

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> tuple[Record, list[Question], random.Random]:
        draw = random.Random(f"{self._seed} {index}")
        if not (index % _CYCLE < self._each and 0 <= index < len(self)):
            return self._scenes[index], [], draw
        number = index // _CYCLE * self._each + index % _CYCLE
        pair = self._pairs[number // 2]
        return pair.records[number % 2], [_question(pair, number % 2)], draw


class PairQuestions:
    """The questions of minimal pairs, with their options; records 2k and 2k + 1 are one pair."""

    def __init__(
        self, config: SceneConfig, *, seed: int, per_pattern: int, letters: bool = True
    ) -> None:
        """Draws nothing yet.

        Args:
          per_pattern: pairs of each pattern.
          letters: whether answers are the letters of options, or their words.
        """
        self._letters = letters
        self._pairs = PairSource(config, seed=seed, length=per_pattern * len(MMVP_PATTERNS))

    def __len__(self) -> int:
        return 2 * len(self._pairs)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"question {index} of {len(self)}")
        pair = self._pairs[index // 2]
        scene, question = pair.records[index % 2], _question(pair, index % 2)
        asked, answer = _said(question, self._letters)
        return Record(
            id=scene.id,
            images=scene.images,
            questions=(question,),
            conversation=_turns([(IMAGE + asked, answer)]),
        )


def blank(record: Record) -> Record:
    """The record with images of one grey, so that answers come from the question."""
    images = tuple(np.full_like(image, 128) for image in record.images)
    return dataclasses.replace(record, images=images)


def question_only(record: Record) -> Record:
    """The record without its images."""
    turns = (
        dataclasses.replace(turn, text=turn.text.removeprefix(IMAGE))
        for turn in record.conversation
    )
    return dataclasses.replace(record, images=(), conversation=tuple(turns))


def _caption(config: ChatConfig, draw: random.Random) -> int | None:
    """Which of `CAPTIONS` begins a conversation, if one does."""
    return int(draw.random() < config.detailed) if draw.random() < config.caption else None


def _any(
    scene: Record, of_pair: Sequence[Question], count: int, draw: random.Random
) -> list[Question]:
    """The question of a pair, and some of any kind."""
    return [*of_pair, *_drawn(scene.questions, count - len(of_pair), draw)]


def _independent(
    scene: Record,
    of_pair: Sequence[Question],
    caption: int | None,
    count: int,
    draw: random.Random,
) -> list[Question]:
    """Questions that neither the caption nor those before them answer."""
    first = list(of_pair)
    if caption is None and not first:
        naming = [one for one in scene.questions if one.kind in NAMING]
        first = _drawn(naming or scene.questions, 1, draw)
    kinds = {one.kind for one in first}
    answered = NAMING.union(kinds, *(_ANSWERED.get(kind, ()) for kind in kinds))
    others = [one for one in scene.questions if one.kind not in answered]
    return [*first, *_drawn([] if caption else others, count - len(first), draw)]


def _drawn(among: Sequence[Question], count: int, draw: random.Random) -> list[Question]:
    return draw.sample(among, min(max(count, 0), len(among)))


def _question(pair: MinimalPair, side: int) -> Question:
    return Question(
        text=pair.question,
        answers=(pair.answers[side],),
        options=pair.options,
        kind=pair.pattern,
    )


def _said(question: Question, letter: bool) -> tuple[str, str]:
    """A question and its answer, by letter where it has options and that is asked."""
    asked = questions.prompt(question)
    if letter and question.options:
        return f"{asked}\n{LETTER}", questions.letter(question)
    return asked, question.answer


def _all_said(
    asked: Sequence[Question], letters: float, draw: random.Random
) -> list[tuple[str, str]]:
    return [_said(one, draw.random() < letters) for one in asked]


def _turns(said: Sequence[tuple[str, str]]) -> tuple[Turn, ...]:
    return tuple(
        Turn(role=role, text=text)
        for pair in said
        for role, text in zip(("user", "assistant"), pair, strict=True)
    )
