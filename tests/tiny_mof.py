"""A tiny LLaVA, conversations about images for it, and the task that trains it on them."""

from __future__ import annotations

import contextlib

from perception_jax.api import Loaded
from perception_jax.data.grouping import Division
from perception_jax.models.llava.config import LlavaConfig
from perception_jax.systems.mof.task import MofTask, MofTaskConfig
from perception_jax.testing import tiny_llava
from tests.tiny_chats import Chats, data, transform

LENGTHS = (256,)


def chats(base: Loaded, source: Chats | None = None, *, maker=None, **settings):
    """The data of a model; batches of four rows, those of two devices."""
    maker = maker or transform(
        processor=base.processor.image,
        image_tokens=base.config.tokens_per_image,
        max_length=256 - base.config.tokens_per_image,
    )
    return data(source, maker=maker, **{"lengths": LENGTHS, "order": "modality"} | settings)


def task(
    config: LlavaConfig = tiny_llava.IMOF,
    *,
    division: Division = Division(rows=2, devices=2),  # noqa: B008
    **settings,
) -> MofTask:
    """Trains the projectors of a fresh tiny LLaVA, or what `settings` say of it."""
    base = tiny_llava.loaded(config)
    options = {"batch_size": division.update, "lengths": LENGTHS, "order": "modality", "chunk": 32}
    options |= settings
    return MofTask(
        MofTaskConfig(**options),
        base,
        chats(
            base,
            Chats.made(24),
            division=division,
            lengths=options["lengths"],
            order=options["order"],
        ),
    )


def batches(one: MofTask, count: int) -> list[dict]:
    """The first training batches."""
    with contextlib.closing(iter(one.datasets()["train"])) as rows:
        found = [next(rows) for _ in range(count)]
    return [{key: x for key, x in batch.items() if key != "id"} for batch in found]
