"""GiVE on scenes: adapters learn to steer the shipped small CLIP to overlooked objects.

    python -m launch.train --config=configs/give/scenes.py --workdir=runs/give_scenes

Images of four artists with two or three objects each; measured on the fifth artist's drawings,
beside the same CLIP without instructions. `:runlocal` is the same in a few steps. `:ablation=NAME`
starts from all three losses and changes what `systems.give.evaluation.ablations` says; `:plus` adds
the losses of `systems.give.plus`.
"""

from __future__ import annotations

import pathlib

import ml_collections

from configs.common import parse_arg, trainer
from configs.give.common import RULES, blocks, group_config, load, task_config
from perception_jax.systems.give.evaluation.ablations import ablation

__all__ = ["finish", "get_config", "get_task", "load", "report"]

OPTIM = {
    # AdamW, with which GiVE trains elsewhere, sits several times longer on the plateau here.
    "name": "muon",
    "learning_rate": 3e-3,
    "weight_decay": 0.05,
    "b2": 0.98,
    "rules": RULES,
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe of the shipped adapters; `runlocal` shrinks everything."""
    chosen = parse_arg(arg, runlocal=False, ablation="", plus=False)
    tiny = chosen.runlocal
    groups, images = (4, 2) if tiny else (8, 6)
    # Adapters' heads are as wide as the backbone's: 64 would be two and a half of its 160.
    config = blocks(groups=groups, images=images, heads=5)
    # With equal weights the two contrasts, which copying an instruction nearly solves, keep the
    # gradient to themselves: 1,200 steps of 96 rows give an AUC of 0.71 on overlooked objects, 0.75
    # with three times the weight on presence, no more with ten times.
    config.losses.oid = 3.0
    config.train = trainer(
        steps=8 if tiny else 3000,
        batch_size=2 * groups * images,
        log_every=4 if tiny else 50,
        evaluate_every=0 if tiny else 1500,
        checkpoint_every=0 if tiny else 1500,
        optim={**OPTIM, "warmup_steps": 2 if tiny else 100},
    )
    config.backbone = "scenes-clip"
    config.data = ml_collections.ConfigDict(
        {
            # Side of the images in pixels, and how many objects they show. The backbone trained
            # at 48; more patches find more of what is small.
            "size": 72,
            "objects": (2, 3),
            # How many different things there are; 0 for all 443.
            "names": 20 if tiny else 0,
            # Shortest and longest side of an object, in sides of the image.
            "sides": (0.3, 0.7),
            # Whether half of the captions leave the name out.
            "unnamed": False,
            # Different scenes; they stay in memory and come again.
            "length": 200 if tiny else 16_000,
            "workers": 0,
        }
    )
    # Scenes of the unseen artist, and absent names that are asked about in each.
    config.evaluation = ml_collections.ConfigDict(
        {"scenes": 12 if tiny else 400, "negatives": 5 if tiny else 30}
    )
    if chosen.plus:
        config.plus.update({"dense": 1.0, "altered": True, "generic": 1.0})
        config.data.unnamed = True
    if chosen.ablation:
        for path, value in ablation(chosen.ablation).overrides.items():
            config.update_from_flattened_dict({path: value})
    else:
        # OIIC costs on this scale (docs/give_scenes.md), so the recipe leaves it out.
        config.losses.oiic = 0.0
    return config


def get_task(config: ml_collections.ConfigDict, loaded=None):
    """The GiVE task of this config.

    Args:
      loaded: a `GiveEncoder` to evaluate (see `load`); its backbone then replaces the config's.
    """
    from perception_jax.api import open_backbone
    from perception_jax.systems.give.data import scenes
    from perception_jax.systems.give.data.training_data import TrainingData
    from perception_jax.systems.give.evaluation.benchmark import evaluation_of
    from perception_jax.systems.give.evaluation.evaluate import EvaluationConfig
    from perception_jax.systems.give.task import GiveTask

    data, asked = config.data, config.evaluation
    backbone = open_backbone(config.backbone) if loaded is None else loaded.backbone
    backbone = backbone.at_size(data.size)
    settings = task_config(config)
    training = TrainingData(
        scenes.training_scenes(_shown(config), seed=config.train.seed, length=data.length),
        group_config(config),
        processor=backbone.processor.image,
        tokenizer=backbone.processor.tokenizer,
        hold=True,
        altered=settings.plus.altered,
    )
    unseen = evaluation_of(
        _test_scenes(config),
        backbone.processor,
        classes=scenes.names(data.names),
        federated=asked.negatives > 0,
        instruction=settings.instruction,
        config=EvaluationConfig(batch_size=256),
        in_memory=True,
    )
    return GiveTask(settings, backbone, training, evaluators={"unseen": unseen})


def report(config: ml_collections.ConfigDict, task, model, folder: pathlib.Path) -> None:
    """Evaluates and writes `results.json` and `report.html` into `folder`."""
    from perception_jax.systems.give.showing import conclude

    conclude.report(
        task,
        model,
        folder,
        config=config.to_dict(),
        title="A small CLIP, told where to look",
        trained_on=_training_in_words(config),
        measured_on="drawings of an artist that never trained",
        records=_test_scenes(config),
    )


def finish(config: ml_collections.ConfigDict, task, model, workdir: pathlib.Path) -> None:
    """After training: the adapters as `workdir/give.safetensors`, with their backbone as the folder
    `workdir/hf`, and the report."""
    from perception_jax.systems.give.showing import conclude

    conclude.save(model, task.backbone, workdir)
    report(config, task, model, workdir)


def _training_in_words(config: ml_collections.ConfigDict) -> str:
    shown, data = _shown(config), config.data
    fewest, most = shown.objects
    small, large = shown.size
    return (
        f"{data.length:,} scenes of four artists, each of {fewest} to {most} objects out of "
        f"{len(shown.names)}, with sides from {small:g} to {large:g} of the image's"
    )


def _shown(config: ml_collections.ConfigDict):
    from perception_jax.systems.give.data import scenes

    data = config.data
    return scenes.GiveScenesConfig(
        canvas=data.size,
        objects=data.objects,
        size=data.sides,
        names=scenes.names(data.names),
        unnamed=data.unnamed,
    )


def _test_scenes(config: ml_collections.ConfigDict):
    from perception_jax.systems.give.data import scenes

    asked = config.evaluation
    return scenes.test_scenes(_shown(config), length=asked.scenes, negatives=asked.negatives)
