"""Settings shared by the configs of published image-text models."""

from __future__ import annotations

from typing import Any

import ml_collections

from configs.common import to_config_dict, trainer
from perception_jax.data.augment import ImageAugment

ROWS = 32_768
"""Batch size of CLIP (arXiv 2103.00020, table 18) and of SigLIP's SO400M (arXiv 2303.15343)."""
RULES = ((r"(^|/)(bias|scale|logit_scale|logit_bias)$", 1.0, False), (r".*",))
"""No weight decay on norms, biases and the temperature."""


def published(
    model: str,
    *,
    loss: str,
    steps: int,
    optim: dict[str, Any],
    mesh: dict[str, int] | None = None,
    parts: int = 1,
) -> ml_collections.ConfigDict:
    """A config that trains a published model from scratch on your own images with captions.

    Args:
      model: hub id, one of `api.PUBLISHED`; gives sizes, vocabulary and image processing.
      loss: "softmax" or "sigmoid".
      steps: of training.
      optim: settings of the optimizer.
      mesh: sizes of its axes; by default parameters are split over all chips.
      parts: of a batch that go through the towers one after another; a power of 2 that divides
        each chip's share.
    """
    config = ml_collections.ConfigDict({"system": "contrastive", "model": model, "loss": loss})
    config.train = trainer(
        steps=steps,
        batch_size=ROWS,
        log_every=50,
        evaluate_every=5000,
        checkpoint_every=1000,
        compute_dtype="bfloat16",
        mesh=mesh or {},
        optim={"schedule": "cosine", "rules": RULES, **optim},
    )
    # A checkpoint to start from, e.g. the published weights of `model`; "" starts from scratch.
    config.start = ""
    config.remat = ml_collections.ConfigDict({"vision": "full", "text": "full"})
    config.parts = parts
    config.data = ml_collections.ConfigDict(
        {
            # A folder or file that `data.sources.open_source` reads; every tenth record tests.
            "source": "data/pairs",
            # Its kind (see `data.sources`); "" guesses it where there is no doubt.
            "kind": "",
            # Share of the records that may be skipped as unusable.
            "max_bad_fraction": 0.01,
            # Smallest share of an image that a random crop keeps; 1 does not crop.
            "min_area": 0.9,
            # What else changes a training image: fields of `data.augment.ImageAugment`; off.
            "augment": to_config_dict(ImageAugment()),
            # Whether each caption comes with one that is made false by one word.
            "altered": False,
            # How often each of a record's captions is drawn; () for all alike.
            "caption_weights": (),
            # Loading processes of each host.
            "workers": 32,
        }
    )
    return config
