"""What the GiVE configs share: blocks of settings, and the task that is made of them.

The recipe is this library's (the paper's own could not be confirmed): AdamW, 2e-4 at 1,024 rows,
500 warm-up steps, cosine to 0.
"""

from __future__ import annotations

import pathlib

import ml_collections

from configs.common import trainer

RULES = ((r"(^|/)(bias|scale|gate)$", 1.0, False), (r".*",))
"""No weight decay on norms and biases."""
RATE, ROWS = 2e-4, 1024
"""Learning rate at a batch of that many rows; it grows with the rows."""


def blocks(*, groups: int, images: int, heads: int | None = None) -> ml_collections.ConfigDict:
    """Everything but the trainer's settings and the data."""
    config = ml_collections.ConfigDict()
    config.adapter = ml_collections.ConfigDict(
        {
            # None: one head for 64 of the image tower's width.
            "heads": ml_collections.FieldReference(heads, field_type=int),
            "layers": "spread",
            "gate": "none",
            "connector": "mlp",
        }
    )
    config.losses = ml_collections.ConfigDict(
        {"oitc": 1.0, "oiic": 1.0, "oid": 1.0, "absent_rows": True, "oiic_temperature": 0.07}
    )
    # The "plus" profile (see `systems.give.plus`); all off is GiVE as specified.
    config.plus = ml_collections.ConfigDict({"dense": 0.0, "altered": False, "generic": 0.0})
    # Switches for ablations: whether adapters see an instruction without its padding, or at all.
    config.mask = True
    config.instruction = True
    config.sampler = ml_collections.ConfigDict(
        {"grouped": True, "groups": groups, "images": images}
    )
    return config


def published(
    backbone: str,
    *,
    size: int,
    steps: int,
    groups: int = 64,
    images: int = 8,
    mode: str = "hf_crop",
) -> ml_collections.ConfigDict:
    """A config for MOInst-like records and a published backbone.

    Args:
      backbone: hub id or folder.
      size: side of the images, pixels.
      steps: of training; 235 are an epoch of MOInst at 1,024 rows.
      mode: "hf_crop" cuts the centre out, "llava_pad" keeps everything and adds bars.
    """
    config = blocks(groups=groups, images=images)
    rows = 2 * groups * images
    config.backbone = backbone
    config.train = trainer(
        steps=steps,
        batch_size=rows,
        log_every=50,
        evaluate_every=500,
        checkpoint_every=500,
        compute_dtype="bfloat16",
        optim={
            "learning_rate": RATE * rows / ROWS,
            "weight_decay": 0.05,
            "b2": 0.98,
            "eps": 1e-6,
            "warmup_steps": 500,
            "rules": RULES,
        },
    )
    config.remat = True
    config.data = ml_collections.ConfigDict(
        {
            # Anything with named objects that `data.sources` reads: canonical MOInst records
            # (`launch.import_moinst`), LVIS, COCO, JSON lines.
            "source": "data/moinst/train.jsonl",
            "test": "data/moinst/test.jsonl",
            # Kind of both (see `data.sources`); "" guesses it where there is no doubt.
            "kind": "",
            # Share of the records that may be skipped as unusable, in training and evaluation.
            "max_bad_fraction": 0.01,
            # Folder of the image files; "" lets the reader find them.
            "images": "",
            "size": size,
            "mode": mode,
            # Caption of objects that have none, e.g. "a photo of a {}."; "" leaves them out.
            "template": "",
            # LVIS: only listed classes are known to be absent.
            "federated": False,
            "workers": 8,
            "hold": False,
        }
    )
    return config


def task_config(config: ml_collections.ConfigDict):
    """The settings of the task, whatever its data are."""
    from perception_jax.systems.give.adapter import AdapterConfig
    from perception_jax.systems.give.encoding.encode import InstructionConfig
    from perception_jax.systems.give.losses import LossConfig
    from perception_jax.systems.give.model import GiveConfig
    from perception_jax.systems.give.plus import PlusConfig
    from perception_jax.systems.give.task import GiveTaskConfig

    adapter = AdapterConfig(
        heads=config.adapter.heads,
        gate=config.adapter.gate,
        connector=config.adapter.connector,
    )
    return GiveTaskConfig(
        model=GiveConfig(layers=config.adapter.layers, adapter=adapter),
        losses=LossConfig(**config.losses),
        instruction=InstructionConfig(masked=config.mask, informed=config.instruction),
        plus=PlusConfig(**config.plus),
        batch_size=config.train.batch_size,
        workers=config.data.workers,
        remat=config.get("remat", False),
    )


def group_config(config: ml_collections.ConfigDict):
    """How batches are drawn."""
    from perception_jax.systems.give.data.sampler import GroupConfig

    return GroupConfig(**config.sampler, seed=config.train.seed)


def get_task(config: ml_collections.ConfigDict, loaded=None):
    """GiVE on records of `config.data`.

    Args:
      loaded: a `GiveEncoder` to evaluate (see `load`); its backbone then replaces the config's.
    """
    from perception_jax.api import open_backbone
    from perception_jax.data.sources import open_source
    from perception_jax.systems.give.data.training_data import TrainingData
    from perception_jax.systems.give.evaluation.benchmark import evaluation_of
    from perception_jax.systems.give.task import GiveTask

    data = config.data
    backbone = open_backbone(config.backbone) if loaded is None else loaded.backbone
    backbone = backbone.at_size(data.size, mode=data.mode)
    processor = backbone.processor
    settings = task_config(config)
    options = {"images": data.images} if data.images else {}
    training = TrainingData(
        open_source(data.source, kind=data.kind, **options),
        group_config(config),
        processor=processor.image,
        tokenizer=processor.tokenizer,
        template=data.template or None,
        hold=data.hold,
        altered=settings.plus.altered,
        max_bad_fraction=data.max_bad_fraction,
    )
    evaluators = {}
    if data.test:
        evaluators["test"] = evaluation_of(
            open_source(data.test, kind=data.kind, **options),
            processor,
            classes=training.index.names,
            federated=data.federated,
            instruction=settings.instruction,
            in_memory=data.hold,
            workers=data.workers,
            max_bad_fraction=data.max_bad_fraction,
        )
    return GiveTask(settings, backbone, training, evaluators=evaluators)


def load(source: str, config: ml_collections.ConfigDict):
    """What `launch.evaluate` measures: a file of adapters, or the folder that it lies in.

    They may name the backbone of the config; any other has to lie beside them or to be shipped.
    """
    from perception_jax.systems.give.pretrained import GiveEncoder

    return GiveEncoder.from_pretrained(source, trusted=(config.backbone,))


def report(config: ml_collections.ConfigDict, task, model, folder: pathlib.Path) -> None:
    """Evaluates and writes `results.json` and `report.html` into `folder`.

    The pictures are of the records of `config.data.test`; without them there are none.
    """
    from perception_jax.systems.give.showing import conclude

    conclude.report(
        task,
        model,
        folder,
        config=config.to_dict(),
        title=f"GiVE on {config.backbone}",
        trained_on=config.data.source,
        measured_on="images that were not trained on",
        records=test_records(config),
    )


def finish(config: ml_collections.ConfigDict, task, model, workdir: pathlib.Path) -> None:
    """After training: the adapters as `workdir/give.safetensors`, with their backbone as the folder
    `workdir/hf`, and the report."""
    from perception_jax.systems.give.showing import conclude

    conclude.save(model, task.backbone, workdir)
    report(config, task, model, workdir)


def test_records(config: ml_collections.ConfigDict):
    """The source of `config.data.test`, or None."""
    from perception_jax.data.sources import open_source

    path = config.data.get("test")
    options = {"images": config.data.images} if path and config.data.images else {}
    return open_source(path, kind=config.data.get("kind"), **options) if path else None
