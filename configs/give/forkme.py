"""GiVE on your own images: copy this file, point it to a JSONL file, run it.

    python -m launch.train --config=configs/give/forkme.py --workdir=runs/mine \
        --config.data.source=my/objects.jsonl

One object a line; image, class and caption are needed, and an image may have several lines:

    {"image": "photos/1.jpg", "class": "kite", "caption": "a red kite above the trees"}

Fifty images are enough to run. Paths are relative to the file. `box` ([x1, y1, x2, y2] in pixels)
and `instruction` are read where they are given; every tenth image is kept for testing.
"""

from __future__ import annotations

import pathlib

import ml_collections

from configs.common import parse_arg, trainer
from configs.give.common import RULES, blocks, group_config, load, task_config

__all__ = ["finish", "get_config", "get_task", "load", "report"]


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Takes no argument."""
    parse_arg(arg)
    config = blocks(groups=4, images=4)
    # Hub id or folder of a CLIP, SigLIP or EVA-CLIP.
    config.backbone = "openai/clip-vit-base-patch16"
    config.train = trainer(
        steps=500,
        batch_size=32,
        log_every=10,
        evaluate_every=100,
        checkpoint_every=100,
        optim={
            "name": "muon",
            "learning_rate": 1e-3,
            "weight_decay": 0.05,
            "b2": 0.98,
            "warmup_steps": 50,
            "rules": RULES,
        },
    )
    config.data = ml_collections.ConfigDict(
        {
            "source": "objects.jsonl",
            # Share of the records that may be skipped as unusable, in training and evaluation.
            "max_bad_fraction": 0.01,
            # Side of the images in pixels; bars keep what a crop would cut off.
            "size": 224,
            "mode": "llava_pad",
            "workers": 0,
        }
    )
    return config


def get_task(config: ml_collections.ConfigDict, loaded=None):
    """GiVE on the lines of `config.data.source`.

    Args:
      loaded: a `GiveEncoder` to evaluate (see `load`); its backbone then replaces the config's.
    """
    from perception_jax.api import open_backbone
    from perception_jax.systems.give.data.training_data import TrainingData
    from perception_jax.systems.give.evaluation.benchmark import evaluation_of
    from perception_jax.systems.give.task import GiveTask

    data = config.data
    backbone = open_backbone(config.backbone) if loaded is None else loaded.backbone
    backbone = backbone.at_size(data.size, mode=data.mode)
    settings = task_config(config)
    train, test = _parts(data.source)
    training = TrainingData(
        train,
        group_config(config),
        processor=backbone.processor.image,
        tokenizer=backbone.processor.tokenizer,
        hold=True,
        altered=settings.plus.altered,
        max_bad_fraction=data.max_bad_fraction,
    )
    own = evaluation_of(
        test,
        backbone.processor,
        classes=training.index.names,
        federated=False,
        instruction=settings.instruction,
        in_memory=True,
        max_bad_fraction=data.max_bad_fraction,
    )
    return GiveTask(settings, backbone, training, evaluators={"own": own})


def report(config: ml_collections.ConfigDict, task, model, folder: pathlib.Path) -> None:
    """Evaluates and writes `results.json` and `report.html` into `folder`."""
    from perception_jax.systems.give.showing import conclude

    conclude.report(
        task,
        model,
        folder,
        config=config.to_dict(),
        title="GiVE on your images",
        trained_on=config.data.source,
        measured_on="every tenth image, which was not trained on",
        records=_parts(config.data.source)[1],
    )


def finish(config: ml_collections.ConfigDict, task, model, workdir: pathlib.Path) -> None:
    """After training: adapters, the folder with their backbone, and the report."""
    from perception_jax.systems.give.showing import conclude

    conclude.save(model, task.backbone, workdir)
    report(config, task, model, workdir)


def _parts(path: str):
    """What trains, and every tenth image."""
    from perception_jax.data.sources import open_source
    from perception_jax.data.sources.combine import split

    return split(open_source(path, kind="objects"), every=10)
