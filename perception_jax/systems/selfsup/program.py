"""The program of self-supervised training for `launch`: data, task, evaluation, report and export.

`config` is an `ml_collections.ConfigDict` as `configs/selfsup/scenes.py` makes it.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from perception_jax.errors import ConfigError

if TYPE_CHECKING:
    from flax import nnx
    from jax.sharding import Mesh

    from perception_jax.api import Loaded
    from perception_jax.data.processors import ImageProcessor
    from perception_jax.data.records import Source
    from perception_jax.models.dinov2.config import Dinov2Config
    from perception_jax.systems.selfsup.data import TwoViews, ViewData
    from perception_jax.systems.selfsup.evaluate import Concepts, PairDiscrimination, Probes
    from perception_jax.systems.selfsup.task import SelfSupTask
    from perception_jax.train.task import Batch

SCENES = "scenes"
"""Value of `data.source` for drawn scenes instead of files."""
ALIKE = ("none", "mirror", "pairs")
"""Values of `data.alike`: what is hard to tell apart in each batch."""
_MEANINGS = {
    "concepts/top1": "The nearest drawing by a training artist shows the same concept.",
    "concepts/top5": "One of the five nearest does.",
    "pairs/accuracy": "Two views of an image are nearer than one of its pair's other image.",
    "probes/direction": "A linear probe of the patch at the object's centre: where it faces.",
    "probes/side": "A linear probe of the mean patch: left or right part of the picture.",
    "probes/height": "A linear probe of the mean patch: upper or lower part of the picture.",
    "probes/colour": "A linear probe of the patch at the object's centre: its colour.",
}


def data(config: Any) -> ViewData:
    """The training data alone."""
    return _data(config, _source(config))


def task(config: Any, loaded: Loaded | None = None) -> SelfSupTask:
    """The task of the trainer.

    Args:
      loaded: a checkpoint from `perception_jax.load` to evaluate; its tower then replaces the
        config's.
    """
    from perception_jax import api
    from perception_jax.systems.selfsup.task import SelfSupConfig, SelfSupTask

    processor = _processor(config) if loaded is None else loaded.processor.image
    start = None if loaded or not config.start else api.prepare(config.start)
    if start is not None:
        _compare_normalisation(start, processor)
    return SelfSupTask(
        SelfSupConfig(**config.loss),
        _model(config) if loaded is None else loaded.config,
        data=data(config),
        evaluators=functools.cache(functools.partial(evaluators, config, processor)),
        start=start,
    )


def _compare_normalisation(start: Loaded, processor: ImageProcessor) -> None:
    own, expected = ((one.mean, one.std) for one in (start.processor.image, processor))
    if own != expected:
        raise ConfigError(
            f"config.start: expected a tower of images normalised by mean and deviation "
            f"{expected}, found {own} in {start.name}. Start from another tower, or from scratch."
        )


def shapes(config: Any) -> tuple[SelfSupTask, Sequence[Batch]]:
    """The task and the shapes of its batches, without data."""
    from perception_jax.systems.selfsup.task import SelfSupConfig, SelfSupTask

    task = SelfSupTask(SelfSupConfig(**config.loss), _model(config), data=_data(config, []))
    return task, task.batch_shapes()


def load(source: str, config: Any, mesh: Mesh | None = None) -> Loaded:
    """A checkpoint to evaluate: an export of a run, or any DINOv2."""
    import perception_jax

    loaded = perception_jax.load(source, mesh=mesh)
    return loaded.at_size(config.model.image_size)


def evaluators(
    config: Any, processor: ImageProcessor
) -> dict[str, Concepts | PairDiscrimination | Probes]:
    """What is measured of a tower that takes images of this processor."""
    from perception_jax.systems.selfsup.evaluate import (
        Concepts,
        PairDiscrimination,
        Probes,
        TowerFeatures,
    )

    features, asked = TowerFeatures(processor), config.evaluation
    return {
        "concepts": Concepts(features, names=asked.names, per_name=asked.per_name),
        "pairs": PairDiscrimination(features, _views(config, images=2), per_pattern=asked.pairs),
        "probes": Probes(features, learned=asked.learned, tested=asked.tested),
    }


def report(config: Any, task: SelfSupTask, model: nnx.Module, folder: pathlib.Path) -> None:
    """Writes `results.json` and `report.html` into `folder`: the tower's numbers, floors, and those
    of an untrained tower and of the image tower of `evaluation.beside` at the same size."""
    import jax

    from perception_jax import api
    from perception_jax.train.results import write_results

    found = _numbers(task.evaluators(), model)
    floors = {
        f"{name}/{key}": float(value)
        for name, one in task.evaluators().items()
        for key, value in one.floors().items()
    }
    other = api.load_backbone(config.evaluation.beside).at_size(config.model.image_size)
    beside = _numbers(evaluators(config, other.processor.image), other.model.vision)
    untrained = _numbers(task.evaluators(), jax.jit(task.init)(jax.random.key(0)))
    columns = {"floor": floors, "untrained": untrained, "beside": beside}
    results = {
        f"{title}/{name}": value
        for title, numbers in columns.items()
        for name, value in numbers.items()
    }
    write_results(folder, found | results)
    columns[config.evaluation.beside] = columns.pop("beside")
    path = _write_page(config, folder, found, columns)
    print(f"report      {path}")


def _numbers(evaluators: Mapping[str, Any], model: nnx.Module) -> dict[str, float]:
    return {
        f"{name}/{key}": value
        for name, one in evaluators.items()
        for key, value in one(model).items()
    }


def _write_page(
    config: Any,
    folder: pathlib.Path,
    found: Mapping[str, float],
    columns: Mapping[str, Mapping[str, float]],
) -> pathlib.Path:
    """Args: columns: other towers' numbers, and floors, by title."""
    from perception_jax.train.metrics import read_metrics
    from perception_jax.viz import Metric, Report, sections

    history = read_metrics(folder)
    subtitle = sections.subtitle(
        history, rows=config.train.batch_size, measured_on="drawings of an artist not trained on"
    )
    page = Report("A self-supervised image tower", subtitle)
    page.add_section("Results")
    page.add_metrics(
        [
            Metric(
                name=name,
                value=value,
                baselines={title: numbers[name] for title, numbers in columns.items()},
                meaning=_MEANINGS.get(name, "The same for pairs of one pattern."),
            )
            for name, value in found.items()
        ]
    )
    loss = sections.curves(history, {"loss": "training loss"})
    chart = sections.step_chart(loss, "Loss of images and patches", "loss")
    sections.add_learning_curves(page, (chart,))
    settings = config.to_dict()
    rows = sections.training_rows(settings["train"])
    sections.add_run_settings(page, settings, rows=rows)
    return page.write(folder / "report.html")


def finish(config: Any, task: SelfSupTask, model: nnx.Module, workdir: pathlib.Path) -> None:
    """After training: the report, and the tower alone as a Hugging Face folder `workdir/hf`,
    verified by loading it.

    Raises:
      CheckpointError: the folder cannot be written, or its model gives other embeddings.
    """
    import numpy as np

    from perception_jax import api
    from perception_jax.interop.verify import export_verified

    report(config, task, model, workdir)
    processor = api.Processor(image=task.data.transform.processor, tokenizer=None)
    loaded = api.Loaded(model=model.tower, config=task.model, processor=processor)
    _, example = task.data.examples(0)[0]

    def outputs(loaded: Loaded) -> dict[str, np.ndarray]:
        pixels = loaded.processor.images(list(example["image"]))
        return {"tokens": np.asarray(loaded.model(pixels).tokens)}

    folder = workdir / "hf"
    export_verified(
        folder,
        lambda path: api.export(loaded, path),
        lambda path: outputs(api.load(path)),
        outputs(loaded),
    )
    print(f"checkpoint  {folder} (Hugging Face layout; loads back with equal tokens)")


def _model(config: Any) -> Dinov2Config:
    """A DINOv2 with 32-wide heads and MLPs of four times the width."""
    from perception_jax.models.dinov2.config import Dinov2Config

    model = config.model
    return Dinov2Config(
        image_size=model.image_size,
        patch_size=model.patch_size,
        width=model.width,
        depth=model.depth,
        heads=model.width // 32,
        mlp_dim=4 * model.width,
    )


def _processor(config: Any) -> ImageProcessor:
    from perception_jax.data.processors import ImageProcessor
    from perception_jax.ops.image import IMAGENET_MEAN, IMAGENET_STD

    return ImageProcessor(size=config.model.image_size, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _source(config: Any) -> Source:
    """Scenes of the training artists, which stay in memory, or the user's own images."""
    from perception_jax.data.records import MMVP_PATTERNS
    from perception_jax.data.scenes.pairs import BothImages, PairSource
    from perception_jax.data.scenes.sample import SceneConfig
    from perception_jax.data.scenes.source import ScenesSource
    from perception_jax.data.sources import open_source
    from perception_jax.data.sources.combine import InMemory

    settings = config.data
    if settings.source != SCENES:
        if settings.alike == "pairs":
            raise ConfigError(
                "config.data.alike='pairs': minimal pairs are drawn for scenes only. Set 'mirror' "
                f"or 'none' for {settings.source}."
            )
        return open_source(settings.source, kind=settings.kind)
    scenes = SceneConfig(
        canvas=config.model.image_size,
        count=(1, settings.objects),
        size=tuple(settings.size),
        backgrounds=tuple(settings.backgrounds),
        language="none",
    )
    seed, length = config.train.seed, settings.length
    if settings.alike == "pairs":
        patterns = tuple(settings.patterns) or MMVP_PATTERNS
        pairs = PairSource(scenes, seed=seed, length=length, patterns=patterns)
        return InMemory(BothImages(pairs), keep=())
    return InMemory(ScenesSource(scenes, seed=seed, length=length), keep=())


def _views(config: Any, *, images: int, mirrored: bool = False) -> TwoViews:
    """Two views of each of a record's images."""
    from perception_jax.data.augment import ImageAugment
    from perception_jax.systems.selfsup.data import TwoViews

    return TwoViews(
        processor=_processor(config),
        augment=ImageAugment(**config.data.augment),
        grid=config.model.image_size // config.model.patch_size,
        images=images,
        mirrored=mirrored,
    )


def _data(config: Any, source: Source) -> ViewData:
    from perception_jax.systems.selfsup.data import ViewData

    alike = config.data.alike
    if alike not in ALIKE:
        raise ConfigError(
            f"config.data.alike: expected one of {', '.join(ALIKE)}, found {alike!r}."
        )
    if config.data.patterns and alike != "pairs":
        raise ConfigError(
            f"config.data.patterns: of no use for alike={alike!r}, which has no pairs. Leave it ()."
        )
    return ViewData(
        source,
        _views(config, images=2 if alike == "pairs" else 1, mirrored=alike == "mirror"),
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        workers=config.data.workers,
        max_bad_fraction=config.data.max_bad_fraction,
    )
