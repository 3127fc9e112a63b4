"""The program of GiVE for `launch`: data, task, evaluation, report, export, and `predict`.

`config` is an `ml_collections.ConfigDict` as `configs/give` makes it. Heavy modules are imported in
the functions that use them, so that `--help` answers at once.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags

if TYPE_CHECKING:
    from flax import nnx
    from jax.sharding import Mesh

    from perception_jax.api import Loaded, Processor
    from perception_jax.data.records import Source
    from perception_jax.inference.images import ImageResult
    from perception_jax.systems.give.evaluation.evaluate import Evaluation
    from perception_jax.systems.give.model import Give
    from perception_jax.systems.give.pretrained import GiveEncoder
    from perception_jax.systems.give.task import GiveTask, GiveTaskConfig
    from perception_jax.systems.give.training_data import TrainingData
    from perception_jax.train.task import Batch

SCENES = "scenes"
"""Value of `data.source` for drawn scenes instead of files."""


def data(config: Any) -> TrainingData:
    """The training data alone; the backbone's weights are neither read nor fetched."""
    from perception_jax.api import backbone_processor

    processor = backbone_processor(config.backbone)
    return _training_data(
        config, processor.at_size(config.data.size, mode=config.data.mode or None)
    )


def task(config: Any, loaded: GiveEncoder | None = None) -> GiveTask:
    """The task of the trainer.

    Args:
      loaded: what `load` gave, to evaluate it; its backbone then replaces the config's.
    """
    from perception_jax.systems.give.task import GiveTask

    backbone = _backbone(config, loaded)
    training = _training_data(config, backbone.processor)
    return GiveTask(
        task_config(config),
        backbone,
        training,
        evaluators=functools.partial(evaluators, config, backbone.processor, training),
    )


def shapes(config: Any) -> tuple[GiveTask, Batch]:
    """The task and the shapes of its batch, without data and weights.

    Published backbones need no files; of any other the headers of its weights are read.
    """
    from perception_jax import api
    from perception_jax.systems.give.task import GiveTask

    published = config.backbone in api.PUBLISHED
    opened = (api.published_backbone if published else api.open_backbone)(config.backbone)
    task = GiveTask(task_config(config), opened.at_size(config.data.size), data=None)
    return task, task.batch_shapes()


def task_config(config: Any) -> GiveTaskConfig:
    """The settings of the task, whatever its data are."""
    from perception_jax.systems.give.adapter import AdapterConfig
    from perception_jax.systems.give.encode import InstructionConfig
    from perception_jax.systems.give.losses import LossConfig
    from perception_jax.systems.give.model import GiveConfig
    from perception_jax.systems.give.plus import PlusConfig
    from perception_jax.systems.give.task import GiveTaskConfig

    adapter = config.adapter
    return GiveTaskConfig(
        model=GiveConfig(
            layers=adapter.layers,
            adapter=AdapterConfig(
                heads=adapter.heads, gate=adapter.gate, connector=adapter.connector
            ),
        ),
        losses=LossConfig(**config.losses),
        instruction=InstructionConfig(masked=config.mask, informed=config.instruction),
        plus=PlusConfig(**config.plus),
        batch_size=config.train.batch_size,
        workers=config.data.workers,
        remat=config.remat,
    )


def load(source: str, config: Any, mesh: Mesh | None = None) -> GiveEncoder:
    """Adapters to evaluate: a file, or the folder that it lies in.

    They may name the backbone of the config; any other has to lie beside them or to be shipped.
    """
    from perception_jax.systems.give.pretrained import GiveEncoder

    return GiveEncoder.from_pretrained(source, trusted=(config.backbone,), mesh=mesh)


def evaluators(config: Any, processor: Processor, training: TrainingData) -> dict[str, Evaluation]:
    """What the config measures, by name; reads all labels of the test records."""
    from perception_jax.data.scenes import objects as scenes
    from perception_jax.systems.give.evaluation.benchmark import evaluation_of
    from perception_jax.systems.give.evaluation.evaluate import EvaluationConfig

    settings, asked = config.data, config.evaluation
    records = _records(config, test=True)
    if records is None:
        return {}
    drawn = settings.source == SCENES
    evaluation = evaluation_of(
        records,
        processor,
        classes=scenes.names(settings.names) if drawn else training.index.names,
        federated=asked.negatives > 0 if drawn else settings.federated,
        instruction=task_config(config).instruction,
        config=EvaluationConfig(batch_size=asked.batch_size),
        in_memory=settings.hold,
        workers=settings.workers,
        max_bad_fraction=settings.max_bad_fraction,
    )
    return {asked.name: evaluation}


def report(config: Any, task: GiveTask, model: nnx.Module, folder: pathlib.Path) -> None:
    """Evaluates and writes `results.json` and `report.html` into `folder`.

    The learning curves come from `metrics.jsonl`, where `folder` is a training's workdir.
    """
    from perception_jax.systems.give.evaluation.evaluate import main_numbers
    from perception_jax.systems.give.report import page
    from perception_jax.systems.give.report.pictures import Pictures
    from perception_jax.train.metrics import read_metrics
    from perception_jax.train.results import write_results
    from perception_jax.viz import sections

    evaluators = task.evaluators()
    if not evaluators:
        print("there are no test images, so no report is written")
        return
    name, evaluation = next(iter(evaluators.items()))
    evaluated = evaluation.run(model)
    numbers = {f"{name}/{key}": value for key, value in main_numbers(evaluated.report).items()}
    # Which stratum each pair is in belongs to the data.
    scores = {key: part for key, part in evaluated.report.to_dict().items() if key != "strata"}
    write_results(folder, numbers, details={"scores": scores})
    history = read_metrics(folder)
    if not task.config.losses.oid:  # the loss of a head that does not train shows no plateau
        history = [{k: v for k, v in row.items() if k != "oid"} for row in history]
    settings = config.to_dict()
    path = page.write(
        folder / "report.html",
        evaluated=evaluated,
        pictures=Pictures(model, task.encoder, evaluation.records, evaluated.measured),
        evaluator=name,
        history=history,
        settings=[
            ("training images", _training_images(config)),
            *page.settings_rows(task, model, settings),
        ],
        config=settings,
        title=config.report.title,
        subtitle=sections.subtitle(
            history, rows=config.train.batch_size, measured_on=config.report.measured_on
        ),
    )
    print(f"report      {path}")


def finish(config: Any, task: GiveTask, model: nnx.Module, workdir: pathlib.Path) -> None:
    """After training: the adapters as `workdir/give.safetensors`, with their backbone as the folder
    `workdir/hf`, and the report."""
    save(model, task.backbone, workdir)
    report(config, task, model, workdir)


def save(model: Give, backbone: Loaded, workdir: pathlib.Path) -> None:
    """Writes the adapters as `workdir/give.safetensors`, and backbone and adapters as the folder
    `workdir/hf`, which is loaded back and compared before it replaces an older one.

    A backbone without a Hugging Face layout leaves the folder out.

    Raises:
      CheckpointError: a file cannot be written, or the outputs differ after loading back.
    """
    import numpy as np

    from perception_jax.errors import ConfigError
    from perception_jax.interop.verify import export_verified
    from perception_jax.systems.give.checkpoint import ADAPTERS_FILE, save_give
    from perception_jax.systems.give.pretrained import GiveEncoder, export_merged

    adapters, merged = workdir / ADAPTERS_FILE, workdir / "hf"
    save_give(adapters, model, backbone)
    print(f"adapters    {adapters} (for the backbone {backbone.name})")
    encoder, probes = GiveEncoder(model, backbone), ("the kite", "a dog")
    side = encoder.processor.image.size
    # Not square, so that the conversion of images to squares is compared too.
    shape = (len(probes), side, 2 * side, 3)
    images = list(np.random.default_rng(0).integers(0, 256, shape, np.uint8))

    def outputs(encoder: GiveEncoder) -> dict[str, np.ndarray]:
        conditioned = encoder.encode(images, probes)
        return {
            "embeddings": np.asarray(encoder.encode(images).embedding),
            "conditioned embeddings": np.asarray(conditioned.embedding),
            "presence logits": np.asarray(conditioned.presence_logit),
        }

    try:
        export_verified(
            merged,
            lambda folder: export_merged(folder, encoder),
            lambda folder: outputs(GiveEncoder.from_pretrained(folder)),
            outputs(encoder),
        )
    except ConfigError as error:
        print(f"no folder of backbone and adapters: {error}")
        return
    print(f"checkpoint  {merged} (backbone and adapters; loads back with equal outputs)")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `launch.predict give`."""
    flags.DEFINE_multi_string(
        "instruction",
        [],
        'An instruction, e.g. "the kite", used verbatim; any number.',
        flag_values=values,
    )
    flags.DEFINE_string(
        "candidates", None, "A file of objects to rank, one name a line.", flag_values=values
    )
    flags.DEFINE_string(
        "captions", None, "A file of captions, one a line; shows the nearest.", flag_values=values
    )
    flags.DEFINE_float(
        "alpha", 1.0, "Strength of the adapters; 0 is the backbone alone.", flag_values=values
    )
    flags.DEFINE_string(
        "backbone", None, "Backbone instead of the one the adapters name.", flag_values=values
    )


def predictor(values: flags.FlagValues) -> Callable[[pathlib.Path], ImageResult]:
    """Gives what `launch.predict give` does with each image."""
    from perception_jax.data.text_lines import read_lines
    from perception_jax.inference.single_image import results_of
    from perception_jax.systems.give.picture import draw
    from perception_jax.systems.give.predict import Predictor, load_encoder
    from perception_jax.systems.give.prediction import GivePrediction

    candidates, captions = (
        () if file is None else read_lines(pathlib.Path(file))
        for file in (values.candidates, values.captions)
    )
    encoder = load_encoder(values.model, backbone=values.backbone)
    predict = Predictor(
        encoder,
        tuple(values.instruction),
        candidates=candidates,
        captions=captions,
        alpha=values.alpha,
        scale=values.scale,
    )

    def summary(prediction: GivePrediction) -> list[str]:
        return [f"{name}: {chance:.0%}" for name, chance in prediction.presences()[:5]]

    facts = {"model": values.model, "backbone": encoder.backbone.name}
    return results_of(predict, draw, summary, facts)


def _backbone(config: Any, loaded: GiveEncoder | None = None) -> Loaded:
    """The backbone with a processor of the config's image size; its weights are read later."""
    from perception_jax.api import open_backbone

    backbone = open_backbone(config.backbone) if loaded is None else loaded.backbone
    return backbone.at_size(config.data.size, mode=config.data.mode or None)


def _training_data(config: Any, processor: Processor) -> TrainingData:
    from perception_jax.data.augment import ImageAugment
    from perception_jax.systems.give.sampler import GroupConfig
    from perception_jax.systems.give.training_data import TrainingData

    return TrainingData(
        _records(config),
        GroupConfig(**config.sampler, seed=config.train.seed),
        processor=processor.image,
        tokenizer=processor.tokenizer,
        template=config.data.template or None,
        hold=config.data.hold,
        altered=config.plus.altered,
        augment=ImageAugment.from_settings(**config.data.augment),
        max_bad_fraction=config.data.max_bad_fraction,
    )


def _records(config: Any, *, test: bool = False) -> Source | None:
    """The records that train, or those that test; None if there are no test records."""
    from perception_jax.data.scenes import objects as scenes
    from perception_jax.data.sources import open_source
    from perception_jax.data.sources.combine import split

    settings, evaluation = config.data, config.evaluation
    if settings.source == SCENES:
        drawn = scenes.ObjectScenesConfig(
            canvas=settings.size,
            objects=settings.objects,
            size=settings.sides,
            names=scenes.names(settings.names),
            unnamed=settings.unnamed,
        )
        if test:
            counts = {"length": evaluation.scenes, "negatives": evaluation.negatives}
            return scenes.test_scenes(drawn, **counts)
        return scenes.training_scenes(drawn, seed=config.train.seed, length=settings.length)
    if test and not (settings.test or settings.test_every):
        return None
    options = {"images": settings.images} if settings.images else {}
    path = settings.test if test and settings.test else settings.source
    records = open_source(path, kind=settings.kind, **options)
    if settings.test or not settings.test_every:
        return records
    return split(records, every=settings.test_every)[int(test)]


def _training_images(config: Any) -> str:
    from perception_jax.data.scenes import objects as scenes

    settings = config.data
    if settings.source != SCENES:
        return settings.source
    fewest, most = settings.objects
    small, large = settings.sides
    return (
        f"{settings.length:,} scenes of four artists, each of {fewest} to {most} objects out of "
        f"{len(scenes.names(settings.names))}, with sides from {small:g} to {large:g} of the "
        "image's"
    )
