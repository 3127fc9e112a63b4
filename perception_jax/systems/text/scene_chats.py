"""Conversations about drawn scenes, to train on without downloads."""

from __future__ import annotations

from perception_jax.data.records import Record, Source, Turn
from perception_jax.data.scenes.sample import SceneConfig
from perception_jax.data.scenes.source import ScenesSource
from perception_jax.data.sources.combine import InMemory

TEST_SEED = 20_000
"""Of the scenes that test; training seeds never reach it."""

_CANVAS = 32
_QUESTION = "Which things does this caption name? {}"


class SceneChats:
    """For each scene a question with its caption, answered with the names of its objects.

    Args:
      seed: of the scenes.
      length: number of scenes.
    """

    def __init__(self, *, seed: int, length: int) -> None:
        config = SceneConfig(canvas=_CANVAS, count=(1, 4), language="captions")
        self._scenes = ScenesSource(config, seed=seed, length=length)

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Record:
        scene = self._scenes[index]
        names = sorted({one.name for one in scene.objects})
        question = Turn(role="user", text=_QUESTION.format(scene.captions[0]))
        answer = Turn(role="assistant", text=", ".join(names))
        return Record(id=scene.id, conversation=(question, answer))


def scene_chats(*, seed: int, length: int) -> Source:
    """`SceneChats`, each of which is drawn once per process."""
    return InMemory(SceneChats(seed=seed, length=length), keep=("conversation",))
