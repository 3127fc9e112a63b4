"""A small CLIP trained from scratch on scenes; its weights ship as "scenes-clip".

    python -m launch.train --config=configs/clip/scenes.py --workdir=runs/scenes_clip

Images of four artists, captions from the scene's own facts. Evaluated while it trains on the fifth
artist's drawings, which it never sees: naming among all training names, naming of the held-out
concepts, and retrieval of composed scenes.

`--config=configs/clip/scenes.py:runlocal` is the same in a few steps on a tiny model.
`--config.data.source=DIR` trains on your own images with captions instead (see `data.sources`).
"""

from __future__ import annotations

import ml_collections

from configs.common import parse_arg, to_config_dict, trainer
from perception_jax.data.augment import ImageAugment

SCENES = "scenes"
"""Name of the scenes as a data source."""
OPTIM = {
    "name": "muon",
    "learning_rate": 2e-3,
    "weight_decay": 0.1,
    "b2": 0.98,
    # The matrices of the blocks take larger steps than embeddings and projections.
    "rules": (
        (r"(^|/)(bias|scale|logit_scale|logit_bias)$", 1.0, False),
        (r"(^|/)blocks/.*kernel$", 3.0),
        (r".*",),
    ),
}
"""Optimizer settings."""


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The shipped model's recipe; the argument `runlocal` shrinks everything."""
    tiny = parse_arg(arg, runlocal=False).runlocal
    config = ml_collections.ConfigDict({"system": "contrastive"})
    config.train = trainer(
        steps=12 if tiny else 9000,
        batch_size=32 if tiny else 128,
        log_every=4 if tiny else 50,
        evaluate_every=0 if tiny else 1000,
        checkpoint_every=0 if tiny else 250,
        optim={
            **OPTIM,
            "warmup_steps": 4 if tiny else 200,
        },
    )
    config.model = ml_collections.ConfigDict(
        {
            "image_size": 48,
            "patch_size": 12,
            "width": 32 if tiny else 160,
            "depth": 2 if tiny else 4,
            "text_width": 32 if tiny else 96,
            "text_depth": 1 if tiny else 2,
            "embed_dim": 32 if tiny else 128,
            "vocab_size": 4096,
            "context": 24,
        }
    )
    # A checkpoint to start from, e.g. "scenes-clip"; "" starts from scratch. `model` then has its
    # sizes, but images and patches may differ.
    config.start = ""
    config.loss = "softmax"
    # What the backward pass computes again instead of keeping it: a name of `nn.stack.REMAT`.
    config.remat = ml_collections.ConfigDict({"vision": "none", "text": "none"})
    # Parts of a batch that go through the towers one after another.
    config.parts = 1
    config.data = ml_collections.ConfigDict(
        {
            # "scenes", or a folder or file of your own that `data.sources.open_source` reads.
            "source": SCENES,
            # Its kind (see `data.sources`); "" guesses it where there is no doubt.
            "kind": "",
            # Share of the records that may be skipped as unusable, in training and evaluation.
            "max_bad_fraction": 0.01,
            # Different scenes; they stay in memory (about 8 KB each at 48 px) and come again in
            # every epoch. `min_area` below 1 crops at random, for images of your own.
            "length": 500 if tiny else 80_000,
            "min_area": 1.0,
            # What else changes a training image: fields of `data.augment.ImageAugment`; off. Its
            # colour part makes captions that name colours wrong.
            "augment": to_config_dict(ImageAugment()),
            # Whether each caption comes with one that is made false by one word, a hard negative.
            "altered": False,
            # Of eight scenes, how many show one large object; the others show up to `objects`.
            "singles": 7,
            "objects": 4,
            # Of eight records, how many are one of two images that differ in one visual pattern.
            "pairs": 0,
            # Whether scenes have a fourth caption that states one fact.
            "facts": False,
            # How often the plain caption, the detailed one and the one without names are drawn.
            "caption_weights": (9.0, 1.0, 0.0),
            # Loading processes; 0 loads in threads, which share the scenes in memory.
            "workers": 0,
        }
    )
    # Portraits of each name and composed scenes in the evaluations.
    config.evaluation = ml_collections.ConfigDict(
        # `pairs`: minimal pairs of each visual pattern.
        {"per_name": 1 if tiny else 4, "scenes": 40 if tiny else 500, "pairs": 0}
    )
    return config
