"""A small self-supervised image tower, trained from scratch on scenes without any text.

    python -m launch.train --config=configs/selfsup/scenes.py --workdir=runs/scenes_ssl

NT-Xent on images and on matched patches, of two augmented views of both images of minimal pairs,
by four artists. The images of a pair are negatives of each other, so that colours and backgrounds,
which they share, are not enough to recognise a view. Evaluated while it trains on the fifth
artist's drawings: the nearest drawing of the same concept, minimal pairs that are told apart, and
linear probes of direction, place and colour; afterwards the same of `scenes-clip`. The result is a
DINOv2 in Hugging Face's layout, `WORKDIR/hf`. `--config.loss.name=vicreg` trains by VICReg.

`:runlocal` is the same in a few steps on a tiny model; `--config.data.source=DIR` with
`--config.data.alike=mirror` (or `none`) trains on your own images.
"""

from __future__ import annotations

import ml_collections

from configs.common import parse_arg, to_config_dict, trainer
from perception_jax.data.augment import ImageAugment

OPTIM = {
    "name": "muon",
    "learning_rate": 2e-3,
    "schedule": "constant",
    "ema": 0.98,
    "weight_decay": 0.05,
    "b2": 0.98,
    "rules": (
        # They start at a fiftieth of the patches' size, and without them an image and its mirror
        # image are nearly the same set of patches.
        (r"position_embedding$", 10.0, False),
        (r"(^|/)(bias|scale)$", 1.0, False),
        # The matrices of the blocks take larger steps than embeddings and projectors.
        (r"(^|/)blocks/.*kernel$", 3.0),
        (r".*",),
    ),
}
"""Optimizer settings."""
AUGMENT = ImageAugment(
    # Mild enough for the two images of a pair to stay different: place, size, colour and direction
    # are what tells them apart.
    min_area=0.6,
    warp=0.05,
    brightness=0.3,
    contrast=0.3,
    blur=0.02,
    sharpen=2.0,
    bits=5,
    colour=True,
    saturation=0.4,
    hue=0.05,
    grey=0.1,
)
"""What makes the two views different."""
BACKGROUNDS = (*("flat",) * 6, "gradient", "noise", "texture", "collage")
"""Mostly plain: views of one image are otherwise recognised by their backgrounds alone."""


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe; the argument `runlocal` shrinks everything."""
    tiny = parse_arg(arg, runlocal=False).runlocal
    config = ml_collections.ConfigDict({"system": "selfsup"})
    config.train = trainer(
        # About two hours of one core; how far it has been run: systems/selfsup/README.md.
        steps=12 if tiny else 6000,
        batch_size=16 if tiny else 24,
        log_every=4 if tiny else 50,
        evaluate_every=0 if tiny else 600,
        checkpoint_every=0 if tiny else 250,
        optim={**OPTIM, "warmup_steps": 4 if tiny else 100},
    )
    config.model = ml_collections.ConfigDict(
        {
            # Patches as those of scenes-clip, at the size at which GiVE uses it: 6 × 6.
            "image_size": 72,
            "patch_size": 12,
            "width": 32 if tiny else 160,
            "depth": 2 if tiny else 4,
        }
    )
    # A tower of these sizes to start from; "" starts from scratch.
    config.start = ""
    config.loss = ml_collections.ConfigDict(
        {
            # "nt_xent" (SimCLR) or "vicreg".
            "name": "nt_xent",
            # Of NT-Xent.
            "temperature": 0.1,
            # Weights of VICReg's terms.
            "invariance": 25.0,
            "variance": 25.0,
            "covariance": 1.0,
            # Share of the patch term in the loss.
            "dense": 0.5,
            # Matched patches of each image that it compares; 0 for all.
            "patches": 8,
            # Width of the projectors, which an export leaves out.
            "projector": 32 if tiny else 256,
            # What the backward pass computes again: a name of `nn.stack.REMAT`.
            "remat": "none",
        }
    )
    config.data = ml_collections.ConfigDict(
        {
            # "scenes", or a folder or file of your own that `data.sources.open_source` reads.
            "source": "scenes",
            # Its kind (see `data.sources`); "" guesses it where there is no doubt.
            "kind": "",
            "max_bad_fraction": 0.01,
            # What is hard to tell apart in each batch: the images of a minimal pair ("pairs"), an
            # image and its mirror image ("mirror"), or nothing ("none").
            "alike": "pairs",
            # Visual patterns of the pairs, in turns; () for all nine equally.
            "patterns": (),
            # Different scenes or pairs; their images stay in memory (16 KB each at 72 px).
            "length": 200 if tiny else 12_000,
            # At most so many objects, and the range of their sides in sides of the image.
            "objects": 3,
            "size": (0.3, 0.95),
            # Kinds of backgrounds, one drawn for each scene.
            "backgrounds": BACKGROUNDS,
            # Fields of `data.augment.ImageAugment`.
            "augment": to_config_dict(AUGMENT),
            # Loading processes; 0 loads in threads, which share the scenes in memory.
            "workers": 0,
        }
    )
    config.evaluation = ml_collections.ConfigDict(
        {
            # Concepts, and test portraits of each.
            "names": 20 if tiny else 300,
            "per_name": 1 if tiny else 2,
            # Minimal pairs of each visual pattern.
            "pairs": 2 if tiny else 40,
            # Images that the probes learn from, and those that test them.
            "learned": 60 if tiny else 3000,
            "tested": 30 if tiny else 1000,
            # A CLIP whose image tower is measured in the same way, in the report.
            "beside": "scenes-clip",
        }
    )
    return config
