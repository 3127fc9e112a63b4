"""A self-supervised task small enough for tests."""

from __future__ import annotations

import dataclasses

from perception_jax.api import Loaded
from perception_jax.data.augment import ImageAugment
from perception_jax.data.processors import ImageProcessor
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.systems.selfsup.data import TwoViews, ViewData
from perception_jax.systems.selfsup.task import SelfSupConfig, SelfSupTask
from perception_jax.testing.tiny_clip import ColourSource

CONFIG = Dinov2Config(image_size=16, patch_size=4, width=32, depth=2, heads=2, mlp_dim=64)
TRANSFORM = TwoViews(
    processor=ImageProcessor(size=16), augment=ImageAugment(min_area=0.5, brightness=0.3), grid=4
)
MIRRORED = dataclasses.replace(TRANSFORM, mirrored=True)


def task(
    batch_size: int = 16,
    transform: TwoViews = TRANSFORM,
    start: Loaded | None = None,
    **loss: float | str,
) -> SelfSupTask:
    """VICReg (or another loss) on noisy colours, without evaluators."""
    data = ViewData(ColourSource(), transform, batch_size=batch_size, seed=0)
    return SelfSupTask(SelfSupConfig(projector=32, **loss), CONFIG, data=data, start=start)
