"""The program of contrastive training for `launch`: data, task, evaluation, report and export.

`config` is an `ml_collections.ConfigDict` as `configs/clip/scenes.py` makes it: `config.model`
holds the sizes of a CLIP, or is the hub id of a published model (`api.PUBLISHED`), which is trained
from scratch or from the checkpoint `config.start`.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flax import nnx
    from jax.sharding import Mesh

    from perception_jax.api import Loaded, Processor
    from perception_jax.data.records import Source
    from perception_jax.models.clip.config import ClipConfig
    from perception_jax.models.siglip.config import SiglipConfig
    from perception_jax.systems.contrastive.benchmark import Benchmark
    from perception_jax.systems.contrastive.data import ContrastiveData
    from perception_jax.systems.contrastive.encode import Embeddings
    from perception_jax.systems.contrastive.task import ContrastiveConfig, ContrastiveTask
    from perception_jax.train.task import Batch

_SIZES = (
    *("vision.width", "vision.depth", "text.width", "text.depth", "text.context"),
    "text.vocab_size",
)
"""What a checkpoint to start from and the config have in common."""
SCENES = "scenes"
"""Value of `data.source` for drawn scenes instead of files."""


def data(config: Any) -> ContrastiveData:
    """The training data alone."""
    return _data(config, _processor(config, _start(config)))


def task(config: Any, loaded: Loaded | None = None) -> ContrastiveTask:
    """The task of the trainer.

    Args:
      loaded: a checkpoint from `perception_jax.load` to evaluate; its model, processor and
        tokenizer then replace the config's.
    """
    from perception_jax.systems.contrastive.task import ContrastiveTask

    start = _start(config) if loaded is None else None
    processor = _processor(config, start) if loaded is None else loaded.processor
    return ContrastiveTask(
        _settings(config),
        _model(config, start) if loaded is None else loaded.config,
        data=_data(config, processor),
        benchmark=functools.partial(_benchmark, config, processor),
        start=start,
    )


def shapes(config: Any) -> tuple[ContrastiveTask, Sequence[Batch]]:
    """The task and the shapes of its batches, without data and tokenizer."""
    from perception_jax.systems.contrastive.data import ContrastiveData
    from perception_jax.systems.contrastive.task import ContrastiveTask

    model = _model(config, _start(config))
    data = ContrastiveData(
        [],
        _image_processor(model),
        batch_size=config.train.batch_size,
        seed=0,
        altered=config.data.altered,
    )
    task = ContrastiveTask(_settings(config), model, data=data)
    return task, task.batch_shapes()


def load(source: str, config: Any, mesh: Mesh | None = None) -> Loaded:
    """A checkpoint to evaluate."""
    import perception_jax

    return perception_jax.load(source, mesh=mesh)


def report(config: Any, task: ContrastiveTask, model: nnx.Module, folder: pathlib.Path) -> None:
    """Evaluates and writes `results.json` and `report.html` into `folder`.

    The embeddings are kept in `folder/predictions`, where a stopped evaluation goes on.
    """
    from perception_jax.systems.contrastive.evaluate import embeddings_on_disk

    benchmark = task.benchmark
    embeddings = embeddings_on_disk(
        benchmark.encoder,
        model,
        benchmark.inputs,
        folder / "predictions",
        settings=repr(task.model),
    )
    _write_report(config, task, model, embeddings, folder)


def _write_report(
    config: Any,
    task: ContrastiveTask,
    model: nnx.Module,
    embeddings: Embeddings,
    folder: pathlib.Path,
) -> None:
    """The learning curves come from `metrics.jsonl`, where `folder` is a training's workdir."""
    from perception_jax.systems.contrastive import report as page
    from perception_jax.train.metrics import read_metrics
    from perception_jax.train.results import write_results
    from perception_jax.viz import sections

    scores = page.evaluate(task.benchmark, embeddings)
    write_results(folder, scores.numbers())
    history = read_metrics(folder)
    own = "your images" if config.data.source != SCENES else "drawings"
    path = page.write(
        folder / "report.html",
        model=model,
        benchmark=task.benchmark,
        embeddings=embeddings,
        scores=scores,
        history=history,
        config=config.to_dict(),
        title=f"A small CLIP, trained on {own}",
        subtitle=sections.subtitle(
            history,
            rows=config.train.batch_size,
            measured_on="images that were not trained on",
        ),
    )
    print(f"report      {path}")


def finish(config: Any, task: ContrastiveTask, model: nnx.Module, workdir: pathlib.Path) -> None:
    """After training: the report, and a Hugging Face folder `workdir/hf`, verified by loading it.

    Embeddings stay in memory: predictions in a workdir that trains on would be of other weights.

    Raises:
      CheckpointError: the folder cannot be written, or its model gives other embeddings.
    """
    import numpy as np

    from perception_jax import api
    from perception_jax.data.images import decode
    from perception_jax.interop.verify import export_verified

    benchmark = task.benchmark
    embeddings = dict(benchmark.encoder.embed(model, benchmark.inputs))
    _write_report(config, task, model, embeddings, workdir)
    loaded = api.Loaded(model=model, config=task.model, processor=task.processor)
    image = decode(benchmark.pictures[0].image)

    def outputs(loaded: Loaded) -> dict[str, np.ndarray]:
        pixels = loaded.processor.images([image])
        return {"embeddings": np.asarray(loaded.model.vision(pixels).embedding)}

    folder = workdir / "hf"
    export_verified(
        folder,
        lambda path: api.export(loaded, path),
        lambda path: outputs(api.load(path)),
        outputs(loaded),
    )
    print(f"checkpoint  {folder} (Hugging Face layout; loads back with equal embeddings)")


def _settings(config: Any) -> ContrastiveConfig:
    from perception_jax.systems.contrastive.task import ContrastiveConfig, TowerRemat

    return ContrastiveConfig(loss=config.loss, remat=TowerRemat(**config.remat), parts=config.parts)


def _model(config: Any, start: Loaded | None) -> ClipConfig | SiglipConfig:
    """The model's dataclass: that of the config, or the start's with its images and patches.

    Raises:
      ConfigError: the start has other sizes than `config.model`.
    """
    from perception_jax.errors import ConfigError
    from perception_jax.systems.contrastive.task import with_patches

    asked = _asked(config.model)
    if start is None:
        return asked
    found = start.config
    if type(found) is not type(asked):
        raise ConfigError(
            f"config.start: expected a {type(asked).__name__}, found {found} in {start.name}."
        )
    values = [(name, *map(operator.attrgetter(name), (found, asked))) for name in _SIZES]
    differing = [f"{name} = {own}, not {other}" for name, own, other in values if own != other]
    if differing:
        raise ConfigError(
            f"config.start: {start.name} has {', '.join(differing)}. Give config.model its sizes; "
            "those of images and patches may differ."
        )
    return with_patches(found, asked)


def _asked(model: Any) -> ClipConfig | SiglipConfig:
    """The model's dataclass: of a hub id, or of sizes with 32-wide heads and MLPs of four times the
    width.

    Raises:
      ConfigError: a hub id that is not among `api.PUBLISHED`.
    """
    from perception_jax import api
    from perception_jax.models.clip.config import ClipConfig, TextConfig, VisionConfig

    if isinstance(model, str):
        return api.published_backbone(model).config
    return ClipConfig(
        vision=VisionConfig(
            image_size=model.image_size,
            patch_size=model.patch_size,
            width=model.width,
            depth=model.depth,
            heads=model.width // 32,
            mlp_dim=4 * model.width,
        ),
        text=TextConfig(
            vocab_size=model.vocab_size,
            context=model.context,
            width=model.text_width,
            depth=model.text_depth,
            heads=model.text_width // 32,
            mlp_dim=4 * model.text_width,
        ),
        embed_dim=model.embed_dim,
    )


def _start(config: Any) -> Loaded | None:
    """The checkpoint to start from, open and not read; None to start from scratch."""
    from perception_jax import api

    return api.open_backbone(config.start) if config.start else None


def _processor(config: Any, start: Loaded | None) -> Processor:
    """The start's; without one CLIP's vocabulary ships, and that of a SigLIP is fetched."""
    from perception_jax import api
    from perception_jax.data.tokenization import ClipTokenizer
    from perception_jax.models.siglip.config import SiglipConfig

    model = _model(config, start)
    if start is not None:
        return start.processor.at_size(model.vision.image_size)
    if isinstance(model, SiglipConfig):
        return api.backbone_processor(config.model)
    tokenizer = ClipTokenizer.shipped(model.text.vocab_size, model.text.context)
    return dataclasses.replace(_image_processor(model), tokenizer=tokenizer)


def _image_processor(model: ClipConfig | SiglipConfig) -> Processor:
    """The processor of a model without its tokenizer."""
    from perception_jax.api import Processor
    from perception_jax.data.processors import ImageProcessor
    from perception_jax.models.registry import architecture_of

    image = ImageProcessor(**architecture_of(model).image_settings(model, "hf"))
    return Processor(image=image, tokenizer=None)


def _data(config: Any, processor: Processor) -> ContrastiveData:
    from perception_jax.data.augment import ImageAugment
    from perception_jax.systems.contrastive.benchmark import training_source
    from perception_jax.systems.contrastive.data import ContrastiveData

    settings = config.data
    if settings.source == SCENES:
        source = training_source(
            processor.image.size,
            seed=config.train.seed,
            length=settings.length,
            singles=settings.singles,
            objects=settings.objects,
            pairs=settings.pairs,
            facts=settings.facts,
        )
    else:
        source = _own(config)[0]
    return ContrastiveData(
        source,
        processor,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        workers=settings.workers,
        caption_weights=settings.caption_weights,
        min_area=settings.min_area,
        augment=ImageAugment.from_settings(**settings.augment),
        altered=settings.altered,
        max_bad_fraction=settings.max_bad_fraction,
    )


def _benchmark(config: Any, processor: Processor) -> Benchmark:
    from perception_jax.systems.contrastive import benchmark

    if config.data.source == SCENES:
        return benchmark.scenes_benchmark(processor.image, processor.tokenizer, **config.evaluation)
    return benchmark.own_benchmark(
        _own(config)[1],
        processor.image,
        processor.tokenizer,
        max_bad_fraction=config.data.max_bad_fraction,
    )


def _own(config: Any) -> tuple[Source, Source]:
    """The user's own records: those that train, and every tenth for testing."""
    from perception_jax.data.sources import open_source
    from perception_jax.data.sources.combine import split

    return split(open_source(config.data.source, kind=config.data.kind), every=10)
