"""The conversations of a config: files or drawn scenes, those that train and those that test."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from perception_jax.data.records import Record, Source
from perception_jax.data.scenes.chats import (
    ChatConfig,
    PairQuestions,
    SceneConversations,
    SingleQuestions,
    blank,
    question_only,
)
from perception_jax.data.sources import open_part, open_source
from perception_jax.data.sources.combine import InMemory
from perception_jax.data.tokenization import LanguageTokenizer, learned_tokenizer
from perception_jax.files import write_whole
from perception_jax.version import __version__

SCENES = "scenes"
"""Value of `data.source` for conversations about drawn scenes instead of files."""
TEST_SEED = 20_000
"""Of the scenes that test; training seeds never reach it."""
PAIRS, QUESTIONS = "pairs", "questions"
"""Names of the two sets of test questions about scenes."""

_EACH = 4
_LEARNED_FROM = 1000
_COMPARED = 16
_KEPT = ("conversation", "questions")


def conversations(config: Any, *, test: bool = False) -> Source | None:
    """The records that train, or those that test; None if there are no test records.

    Training scenes whose features are kept (`data.keep`) are drawn once: their conversations are
    kept beside them, and the records' images are names alone.
    """
    if config.data.source == SCENES and config.data.keep and not test:
        return _kept(config)
    return pictured(config, test=test)


def pictured(config: Any, *, test: bool = False) -> Source | None:
    """As `conversations`, with images in any case; scenes are drawn when they are read."""
    settings = config.data
    if settings.source == SCENES:
        seed = TEST_SEED if test else settings.draw
        length = config.evaluation.scenes if test else settings.scenes
        if settings.each:
            chats = SingleQuestions(_chats(config), seed=seed, length=length, each=settings.each)
        else:
            chats = SceneConversations(_chats(config), seed=seed, length=length)
        return InMemory(chats, keep=_KEPT)
    images = {"images": settings.images} if settings.images else {}
    return open_part(
        settings.source,
        test=test,
        test_path=settings.test,
        test_every=settings.test_every,
        kind=settings.kind,
        **images,
    )


def _kept(config: Any) -> Source:
    """The conversations about training scenes from a file, which is written if it is missing.

    Some of them give the file its name beside the settings, so that a version of the package that
    draws others does not take the file of an earlier one.
    """
    settings, source = config.data, pictured(config)
    drawn = (settings.scenes, settings.draw, settings.each, _chats(config), __version__)
    some = [_line(record) for record in some_records(source)]
    digest = hashlib.sha256(repr((drawn, some)).encode()).hexdigest()[:16]
    path = pathlib.Path(settings.keep) / f"conversations-{digest}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(_line(source[k]) for k in range(len(source))))
    return open_source(path, kind="jsonl")


def _line(record: Record) -> str:
    turns = [{"role": turn.role, "text": turn.text} for turn in record.conversation]
    images = {"images": [f"{record.id}.png"] * len(record.images)} if record.images else {}
    return json.dumps({"id": record.id, **images, "conversation": turns}) + "\n"


def some_records(source: Source) -> Iterator[Record]:
    """Yields a few records of a source, spread over all, by which two sources are compared."""
    places = np.linspace(0, len(source) - 1, min(_COMPARED, len(source)))
    return (source[int(k)] for k in places)


def test_questions(config: Any) -> dict[str, Source]:
    """Single questions about the drawings of the artist that never trains, by the set's name.

    `PAIRS` are those of minimal pairs, and `QUESTIONS` any questions about scenes; without drawn
    scenes, or where the config asks for none, a set is missing. Pairs are answered by letter if any
    question of the training conversations is.
    """
    asked, found = config.evaluation, {}
    if config.data.source != SCENES:
        return found
    if asked.pairs:
        chats = _chats(config, split="test")
        found[PAIRS] = PairQuestions(
            chats.scenes(), seed=TEST_SEED, per_pattern=asked.pairs, letters=chats.letters > 0
        )
    if asked.questions:
        chats = _chats(config, split="test", pairs=0)
        length = -(-asked.questions // _EACH)
        found[QUESTIONS] = SingleQuestions(chats, seed=TEST_SEED, length=length, each=_EACH)
    return {name: InMemory(source, keep=_KEPT) for name, source in found.items()}


FLOORS = {"blank image": blank, "question only": question_only}
"""Changes of test records that show what questions give away, by name."""


def learned_vocabulary(config: Any, size: int) -> LanguageTokenizer:
    """A tokenizer learned from the first training conversations; see `learned_tokenizer`."""
    source = conversations(config)
    count = min(len(source), _LEARNED_FROM)
    turns = (turn for k in range(count) for turn in source[k].conversation)
    return learned_tokenizer((f"{turn.role}\n{turn.text}" for turn in turns), size)


def _chats(config: Any, **changes: Any) -> ChatConfig:
    return ChatConfig(**{"canvas": config.data.canvas, **config.data.chats, **changes})
