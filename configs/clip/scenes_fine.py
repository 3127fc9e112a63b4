"""A finer CLIP on scenes, which starts from "scenes-clip": smaller patches, harder captions. Its
weights ship as "scenes-clip-fine".

    nice python -m launch.train --config=configs/clip/scenes_fine.py --workdir=runs/scenes_fine

Unlike `configs/clip/scenes.py`, half of the images show several objects and an eighth are images of
minimal pairs; scenes have captions that state one fact, every caption comes with one that is made
false by one word, and images are augmented against the difference between artists. Evaluated on the
fifth artist's drawings, with minimal pairs of all nine patterns in addition. The weights of
"scenes-clip" are resized to patches of 8 pixels (`config.start`). It saves often; the same command
resumes it.

`:runlocal` is the same in a few steps on a tiny model.
"""

from __future__ import annotations

import ml_collections

from configs.clip import scenes
from configs.common import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe; the argument `runlocal` shrinks everything."""
    tiny = parse_arg(arg, runlocal=False).runlocal
    config = scenes.get_config(arg)
    config.data.update(
        {
            "singles": 3,
            "pairs": 1,
            "facts": True,
            # Plain, detailed, without names, one fact.
            "caption_weights": (4.0, 2.0, 0.5, 2.0),
            "altered": True,
        }
    )
    # Brightness and contrast stay moderate and the colour part off: captions name colours.
    config.data.augment.update(
        {
            "min_area": 0.9,
            "warp": 0.04,
            "brightness": 0.2,
            "contrast": 0.25,
            "blur": 0.012,
            "sharpen": 2.0,
            "bits": 4,
        }
    )
    config.evaluation.pairs = 2 if tiny else 100
    if tiny:
        return config
    # 0.8 million images, after the 1.2 million of the start.
    config.train.update({"steps": 6000, "evaluate_every": 1000, "checkpoint_every": 200})
    config.start = "scenes-clip"
    config.model.update({"image_size": 64, "patch_size": 8})
    return config
