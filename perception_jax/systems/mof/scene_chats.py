"""Conversations about drawn scenes, to train on without downloads."""

from __future__ import annotations

from perception_jax.data.records import Record, Source, Turn
from perception_jax.data.scenes import questions
from perception_jax.data.scenes.sample import SceneConfig
from perception_jax.data.scenes.source import ScenesSource
from perception_jax.data.sources.combine import InMemory

TEST_SEED = 20_000
"""Of the scenes that test; training seeds never reach it."""

_CAPTION = "<image>\nProvide a one-sentence caption for the provided image."
_NAMES = "Which things does this caption name? {}"


class SceneImageChats:
    """For each scene a caption as first answer, then its questions; some are text alone.

    Args:
      seed: of the scenes.
      length: number of scenes.
      canvas: side of the images, pixels.
      turns: most questions of a scene.
      text_every: each so many-th record is a question about a caption alone; 0 for none.
    """

    def __init__(
        self, *, seed: int, length: int, canvas: int = 48, turns: int = 2, text_every: int = 8
    ) -> None:
        config = SceneConfig(canvas=canvas, count=(1, 4))
        self._scenes = ScenesSource(config, seed=seed, length=length)
        self._turns, self._text_every = turns, text_every

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Record:
        scene = self._scenes[index]
        if self._text_every and index % self._text_every == self._text_every - 1:
            names = sorted({one.name for one in scene.objects})
            pairs, images = [(_NAMES.format(scene.captions[0]), ", ".join(names))], ()
        else:
            asked = scene.questions[: self._turns]
            pairs = [(_CAPTION, scene.captions[0])]
            pairs += [(questions.prompt(one), one.answer) for one in asked]
            images = scene.images
        turns = [
            Turn(role=role, text=text)
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return Record(id=scene.id, images=images, conversation=tuple(turns))


def scene_chats(*, seed: int, length: int, canvas: int = 48) -> Source:
    """`SceneImageChats`, each of which is drawn once per process."""
    return InMemory(
        SceneImageChats(seed=seed, length=length, canvas=canvas), keep=("conversation",)
    )
