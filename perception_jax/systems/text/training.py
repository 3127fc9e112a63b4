"""The part of the text system's program that trains: data, task, evaluation, report and export.

`config` is an `ml_collections.ConfigDict` as `configs/text/common.py` makes it.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from flax import nnx
    from jax.sharding import Mesh

    from perception_jax.api import Loaded
    from perception_jax.data.packing import PackedTexts
    from perception_jax.data.records import Source
    from perception_jax.data.tokenization import LanguageTokenizer
    from perception_jax.models.llama.config import LlamaConfig
    from perception_jax.systems.text.perplexity import Perplexity
    from perception_jax.systems.text.task import TextTask, TextTaskConfig
    from perception_jax.train.task import Batch

SCENES = "scenes"
"""Value of `data.source` for conversations about drawn scenes instead of files."""
HELD_OUT = "held_out"
"""Name of the evaluator."""

_PROBED = 32
"""Tokens by which an export is compared with the model."""


def data(config: Any) -> PackedTexts:
    """The training data alone; no weights are read."""
    return _packed(config, *_described(config), _records(config))


def task(config: Any, loaded: Loaded | None = None) -> TextTask:
    """The task of the trainer.

    Args:
      loaded: what `load` gave, to evaluate it; it then replaces the config's model.
    """
    from perception_jax.systems.text.model import tokenizer_of
    from perception_jax.systems.text.task import TextTask

    base = _base(config) if loaded is None else loaded
    own = base.config, tokenizer_of(base)
    return TextTask(
        task_config(config),
        base,
        _packed(config, *own, _records(config)),
        scratch=not config.model,
        evaluators=functools.partial(_evaluators, config, *own),
    )


def shapes(config: Any) -> tuple[TextTask, Sequence[Batch]]:
    """The task and the shapes of its batches, without data and weights."""
    from perception_jax.api.language import language_config
    from perception_jax.systems.text.task import TextTask

    model = language_config(config.model) if config.model else _described(config)[0]
    task = TextTask(task_config(config), _unread(model, None), None, scratch=not config.model)
    return task, task.batch_shapes()


def task_config(config: Any) -> TextTaskConfig:
    """The settings of the task, whatever its data are."""
    from perception_jax.nn.lora import LoraConfig
    from perception_jax.systems.text.task import TextTaskConfig

    settings = config.lora.to_dict()
    layers = settings.pop("layers")
    return TextTaskConfig(
        batch_size=config.train.batch_size,
        length=config.data.length,
        lora=LoraConfig(**settings) if settings["rank"] else None,
        layers=tuple(layers),
        remat=config.remat,
        chunk=config.chunk,
    )


def load(source: str, config: Any, mesh: Mesh | None = None) -> Loaded:
    """A checkpoint to evaluate, or a folder of PEFT with LoRA for the config's model."""
    import perception_jax
    from perception_jax.api import load_lora
    from perception_jax.interop import peft

    if (pathlib.Path(source) / peft.CONFIG).is_file():
        return load_lora(perception_jax.load(config.model, mesh=mesh), source)
    return perception_jax.load(source, mesh=mesh)


def report(config: Any, task: TextTask, model: nnx.Module, folder: pathlib.Path) -> None:
    """Evaluates and writes `results.json` and `report.html` into `folder`.

    The learning curves come from `metrics.jsonl`, where `folder` is a training's workdir.
    """
    from perception_jax.train.metrics import read_metrics
    from perception_jax.train.results import write_results
    from perception_jax.viz.sections import language_report

    evaluators = task.evaluators()
    if not evaluators:
        print("there are no test texts, so no report is written")
        return
    held_out = evaluators[HELD_OUT]
    found = held_out(model)
    write_results(folder, {f"{HELD_OUT}/{name}": value for name, value in found.items()})
    page = language_report(
        "A language model on conversations and texts",
        "texts",
        counts=f"texts: {held_out.data.counts}",
        numbers=found,
        history=read_metrics(folder),
        held_out=HELD_OUT,
        settings=config.to_dict(),
        rows=[("rows", f"{config.train.batch_size} of {config.data.length} tokens")],
    )
    print(f"report      {page.write(folder / 'report.html')}")


def finish(config: Any, task: TextTask, model: nnx.Module, workdir: pathlib.Path) -> None:
    """After training: the report, and the result as a folder that was loaded back and compared: the
    model in Hugging Face's layout, `workdir/hf`, or its LoRA for PEFT, `workdir/lora`.

    Raises:
      CheckpointError: the folder cannot be written, or its model gives other logits.
    """
    from perception_jax import api
    from perception_jax.interop.verify import export_verified
    from perception_jax.shard.mesh import mesh_of

    report(config, task, model, workdir)
    mesh = mesh_of(model)
    loaded = dataclasses.replace(task.base, model=model, weights=None)
    if task.config.lora is None:
        folder, kind = workdir / "hf", "Hugging Face layout"
        write, read = api.export, functools.partial(api.load, mesh=mesh)
    else:
        folder, kind = workdir / "lora", f"LoRA for {task.base.name}, PEFT's layout"
        write, read = api.save_lora, functools.partial(api.load_lora, _without_lora(loaded))
    export_verified(
        folder,
        lambda path: write(loaded, path),
        lambda path: _logits(read(path), mesh),
        _logits(loaded, mesh),
        tolerance=1e-4,
    )
    print(f"checkpoint  {folder} ({kind}; loads back with equal logits)")


def _logits(loaded: Loaded, mesh: Mesh | None) -> dict[str, np.ndarray]:
    """Logits of some tokens."""
    import jax
    import numpy as np

    from perception_jax.inference.batches import current_mesh

    ids = np.arange(1, _PROBED + 1)[None] % loaded.config.vocab_size
    with current_mesh(mesh):
        return {"logits": np.asarray(jax.jit(lambda model: model(ids).logits)(loaded.model))}


def _without_lora(loaded: Loaded) -> Loaded:
    """The model below LoRA, which shares its leaves."""
    from perception_jax.models.params import flatten, unflatten

    plain, leaves = _unread(loaded.config, None).model, flatten(loaded.model)
    own = {path: leaves[path] for path in flatten(plain)}
    return dataclasses.replace(loaded, model=unflatten(plain, own))


def _base(config: Any) -> Loaded:
    """The model with its weights unread."""
    from perception_jax import api

    return api.prepare(config.model) if config.model else _unread(*_described(config))


def _described(config: Any) -> tuple[LlamaConfig, LanguageTokenizer]:
    """Configuration and tokenizer; of a hub id only settings are fetched."""
    from perception_jax.api import language

    if config.model:
        return language.describe_language(config.model)
    sizes = config.scratch.to_dict()
    return language.drawn_language(sizes, sizes.pop("tokenizer"))


def _unread(model: LlamaConfig, tokenizer: LanguageTokenizer | None) -> Loaded:
    """A model of shapes alone."""
    from perception_jax.api import Processor
    from perception_jax.api.language import without_weights

    return without_weights(model, Processor(image=None, tokenizer=tokenizer))


def _packed(
    config: Any, model: LlamaConfig, tokenizer: LanguageTokenizer, records: Source
) -> PackedTexts:
    from perception_jax.data.packing import PackedTexts, TextTransform
    from perception_jax.systems.text.model import choose_template

    settings = config.data
    return PackedTexts(
        records,
        TextTransform(
            tokenizer=tokenizer,
            template=choose_template(settings.template, tokenizer),
            length=settings.length,
            vocab_size=model.vocab_size,
        ),
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        packed=settings.packed,
        workers=settings.workers,
        max_bad_fraction=settings.max_bad_fraction,
    )


def _evaluators(
    config: Any, model: LlamaConfig, tokenizer: LanguageTokenizer
) -> dict[str, Perplexity]:
    from perception_jax.systems.text.perplexity import Perplexity

    records = _records(config, test=True)
    if records is None:
        return {}
    held_out = Perplexity(
        _packed(config, model, tokenizer, records),
        batch_size=config.evaluation.batch_size,
        dtype=config.train.compute_dtype,
        chunk=config.chunk,
    )
    return {HELD_OUT: held_out}


def _records(config: Any, *, test: bool = False) -> Source | None:
    """The records that train, or those that test; None if there are no test records."""
    from perception_jax.data.sources import open_part
    from perception_jax.systems.text.scene_chats import TEST_SEED, scene_chats

    settings = config.data
    if settings.source == SCENES:
        if test:
            return scene_chats(seed=TEST_SEED, length=config.evaluation.scenes)
        return scene_chats(seed=config.train.seed, length=settings.scenes)
    return open_part(
        settings.source,
        test=test,
        test_path=settings.test,
        test_every=settings.test_every,
        kind=settings.kind,
    )
