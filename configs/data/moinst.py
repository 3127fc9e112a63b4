"""Data for GiVE, to look at before anything is trained on it.

    python -m launch.check_data --config=configs/data/moinst.py \
        --config.data.source=data/moinst/train.jsonl --config.data.images=coco

Draws rows of training batches: the image, its objects with their captions, the instruction and the
class that the image lacks. `source` is anything with named objects that `data.sources` reads:
canonical records (`launch.import_moinst`), LVIS, COCO, JSON lines. There is no model here.
"""

from __future__ import annotations

import ml_collections

from configs.common import parse_arg, trainer


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Batches of the research default; takes no argument."""
    parse_arg(arg)
    config = ml_collections.ConfigDict()
    # Ten epochs of 240,000 annotations.
    config.train = trainer(steps=2350, batch_size=1024)
    config.data = ml_collections.ConfigDict(
        {
            "source": "data/moinst/train.jsonl",
            # Its kind (see `data.sources`); "" guesses it where there is no doubt.
            "kind": "",
            # Share of the records that may be skipped as unusable, in training and evaluation.
            "max_bad_fraction": 0.01,
            # Folder of the image files; "" lets the reader find them.
            "images": "",
            # Classes of a batch, and images of each; a batch has twice their product as rows.
            "groups": 64,
            "images_per_group": 8,
            # Side of the model's image; "hf_crop" cuts its centre out, "llava_pad" adds bars.
            "size": 224,
            "mode": "hf_crop",
            # Caption of objects that have none, e.g. "a photo of a {}."; "" leaves them out.
            "template": "",
        }
    )
    return config


def get_task(config: ml_collections.ConfigDict, loaded=None):
    """The training data alone, with the `examples` that `check_data` asks for."""
    from perception_jax.data.processors import ImageProcessor
    from perception_jax.data.sources import open_source
    from perception_jax.data.tokenization import ClipTokenizer
    from perception_jax.systems.give.data.sampler import GroupConfig
    from perception_jax.systems.give.data.training_data import TrainingData

    del loaded  # no model looks at this
    data = config.data
    options = {"images": data.images} if data.images else {}
    return TrainingData(
        open_source(data.source, kind=data.kind, **options),
        GroupConfig(groups=data.groups, images=data.images_per_group, seed=config.train.seed),
        processor=ImageProcessor(size=data.size, mode=data.mode),
        tokenizer=ClipTokenizer.shipped(),
        template=data.template or None,
        max_bad_fraction=data.max_bad_fraction,
    )
