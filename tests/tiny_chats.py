"""Conversations about images of one colour, and what makes batches of them, for tests."""

from __future__ import annotations

import dataclasses

import numpy as np

from perception_jax.data.conversation import TEMPLATES
from perception_jax.data.grouping import Division
from perception_jax.data.image_chats import ImageChats, ImageChatTransform
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Record, Turn
from perception_jax.testing import tiny_llama

SIDE, IMAGE_TOKENS = 16, 4


def chat(name: str, *words: str, images: int = 0, colour: int = 0) -> Record:
    """Turns of user and assistant about images that are as bright as `colour` says."""
    roles = ("user", "assistant")
    turns = (Turn(role=roles[k % 2], text=one) for k, one in enumerate(words))
    image = np.full((SIDE, 2 * SIDE, 3), colour, np.uint8)
    return Record(id=name, images=(image,) * images, conversation=tuple(turns))


@dataclasses.dataclass(frozen=True)
class Chats:
    """A list of records; every fourth is text alone."""

    records: tuple[Record, ...]

    @classmethod
    def made(cls, count: int = 12) -> Chats:
        rng = np.random.default_rng(0)
        words = ("the", "cat", "sat", "at", "a", "hat")

        def some(most: int) -> str:
            return " ".join(rng.choice(words, rng.integers(1, most)))

        return cls(
            tuple(
                chat(f"text{k}", some(4), some(6))
                if k % 4 == 3
                else chat(f"chat{k}", f"<image>\n{some(4)}", some(6), images=1, colour=10 * k + 5)
                for k in range(count)
            )
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]


def transform(template: str = "vicuna_v1", **changes) -> ImageChatTransform:
    settings = {
        "tokenizer": tiny_llama.tokenizer(),
        "processor": ImageProcessor(size=SIDE, mode="llava_pad"),
        "template": TEMPLATES[template],
        "vocab_size": tiny_llama.tokenizer().vocab_size,
        "max_length": 240,
        "image_tokens": IMAGE_TOKENS,
    }
    return ImageChatTransform(**settings | changes)


def data(source: Chats | None = None, *, maker: ImageChatTransform | None = None, **settings):
    maker = transform() if maker is None else maker
    options = {"lengths": (maker.longest,), "division": Division(rows=2, devices=2)}
    return ImageChats(Chats.made() if source is None else source, maker, **options | settings)
