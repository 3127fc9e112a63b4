"""DINOv2's checkpoints, with and without registers."""

from __future__ import annotations

from typing import Any

from perception_jax.models import timm
from perception_jax.models.architecture import Architecture, Claim, image_code
from perception_jax.models.dinov2 import names
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.dinov2.modeling import Dinov2
from perception_jax.models.dinov2.params import TABLES
from perception_jax.ops.image import IMAGENET_MEAN, IMAGENET_STD


def _image_settings(config: Dinov2Config, layout: str) -> dict[str, Any]:
    code = image_code(layout)
    if layout == "reference":
        code["alpha"] = "drop"  # torchvision's ImageFolder converts as it opens
    # Published weights are evaluated at another size than that of their positions; other towers
    # have their size in Hugging Face's settings.
    published = layout != "hf" or config.image_size == _PUBLISHED
    size = {"size": 224, "resize": 256} if published else {"size": config.image_size}
    return {**size, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, **code}


_PUBLISHED = 518
"""Image size of the stored grid of positions of all published weights."""

ARCHITECTURES = (
    Architecture(
        name="dinov2",
        model_types=("dinov2_with_registers",),
        build=Dinov2,
        owns=lambda config: isinstance(config, Dinov2Config),
        read_config={
            "hf": Dinov2Config.from_hf,
            "timm": names.from_timm,
            "jax": Dinov2Config.from_jax,
        },
        write_config={
            "hf": Dinov2Config.to_hf,
            "reference": names.check_reference,
            "timm": names.to_timm,
            "jax": Dinov2Config.to_jax,
        },
        tables=TABLES,
        claims={
            "timm": Claim(
                lambda settings: names.is_dinov2(timm.name(settings)),
                "e.g. vit_base_patch14_dinov2",
            )
        },
        read_names=names.read,
        image_settings=_image_settings,
    ),
)
"""The architectures of this module; see `models.registry`."""
