"""What turns settings into the data, the task, the evaluation and the results of training.

`config` is an `ml_collections.ConfigDict` as `configs/mof/common.py` makes it. Heavy modules are
imported in the functions that use them, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flax import nnx
    from jax.sharding import Mesh

    from perception_jax.api import Loaded
    from perception_jax.data.image_chats import ImageChats, ImageChatTransform
    from perception_jax.data.records import Source
    from perception_jax.inference.held_out import TokenPredictions
    from perception_jax.systems.mof.answers import ExactAnswers
    from perception_jax.systems.mof.task import MofTask, MofTaskConfig
    from perception_jax.train.task import Batch, Evaluator

HELD_OUT = "held_out"
"""Name of the evaluator."""

_PROBED = 8
"""Tokens of text by which an export is compared with the model, behind an image."""
_log = logging.getLogger(__name__)


def data(config: Any) -> ImageChats:
    """The training data alone; no weights are read."""
    from perception_jax.systems.mof.models import described
    from perception_jax.systems.mof.records import conversations

    return _chats(config, described(config), conversations(config))


def task(config: Any, loaded: Loaded | None = None) -> MofTask:
    """The task of the trainer.

    Args:
      loaded: what `load` gave, to evaluate it; it then replaces the config's model.
    """
    from perception_jax.systems.mof.models import opened
    from perception_jax.systems.mof.records import conversations
    from perception_jax.systems.mof.task import MofTask

    base = opened(config) if loaded is None else loaded
    records = conversations(config)
    _compare_schedule(config, records)
    return MofTask(
        task_config(config),
        base,
        _chats(config, base, records),
        drawn=_drawn(config) if loaded is None else (),
        evaluators=functools.partial(_evaluators, config, base),
    )


def shapes(config: Any) -> tuple[MofTask, Sequence[Batch]]:
    """The task and the shapes of its batches, without data and weights."""
    from perception_jax.systems.mof.models import planned
    from perception_jax.systems.mof.task import MofTask

    task = MofTask(task_config(config), planned(config), None, drawn=_drawn(config))
    return task, task.batch_shapes()


def task_config(config: Any) -> MofTaskConfig:
    """The settings of the task, whatever its data are.

    Raises:
      ConfigError: a batch that is not that of the recipe's devices, or micro-batches that divide
        the rows of one of them.
    """
    from perception_jax.errors import ConfigError
    from perception_jax.nn.lora import LoraConfig
    from perception_jax.systems.mof.task import MofTaskConfig

    division, train = _division(config), config.train
    if train.batch_size != division.update:
        raise ConfigError(
            f"train.batch_size: expected {division.update}, the rows of all devices of the recipe "
            f"(config.division), found {train.batch_size}. Change both."
        )
    micro = train.batch_size // train.optim.accumulate
    if config.device_mean and micro % division.rows:
        raise ConfigError(
            f"train.optim.accumulate: expected micro-batches of whole devices of the recipe "
            f"({division.rows} rows each), found {micro} rows. Take fewer micro-batches, or set "
            "config.device_mean=False for the mean over all tokens."
        )
    return MofTaskConfig(
        batch_size=train.batch_size,
        lengths=tuple(config.data.lengths),
        max_images=config.data.max_images,
        order=config.data.order,
        trains=config.trains,
        lora=LoraConfig(**config.lora) if config.trains == "lora" else None,
        device_mean=config.device_mean,
        remat=config.remat,
        chunk=config.chunk,
    )


def load(source: str, config: Any, mesh: Mesh | None = None) -> Loaded:
    """A checkpoint to evaluate: a whole model, or for the config's language model and image towers
    a folder of projectors or of LoRA with projectors, as a run writes them."""
    import perception_jax
    from perception_jax.systems.mof.results import is_part, with_part

    if is_part(source):
        return with_part(config, source, mesh)
    return perception_jax.load(source, mesh=mesh)


def report(config: Any, task: MofTask, model: nnx.Module, folder: pathlib.Path) -> None:
    """Evaluates and writes `results.json` and `report.html` into `folder`.

    The learning curves come from `metrics.jsonl`, where `folder` is a training's workdir.
    """
    from perception_jax.systems.mof.scene_results import add_test_questions, floors
    from perception_jax.train.metrics import read_metrics
    from perception_jax.train.results import write_results
    from perception_jax.viz.sections import language_report

    evaluators = task.evaluators()
    if not evaluators:
        print("there are no test conversations, so no report is written")
        return
    measured = {name: evaluator(model) for name, evaluator in evaluators.items()}
    without_seeing = floors(config, task.base, model, evaluators[HELD_OUT].predictions)
    write_results(
        folder,
        {
            f"{name}/{key}": value
            for name, numbers in {**measured, **without_seeing}.items()
            for key, value in numbers.items()
        },
    )
    held_out, found = evaluators[HELD_OUT], measured.pop(HELD_OUT)
    page = language_report(
        "A LLaVA on conversations about images",
        "conversations",
        counts=f"conversations: {held_out.data.counts}",
        numbers=found,
        history=read_metrics(folder),
        held_out=HELD_OUT,
        settings=config.to_dict(),
        rows=[("trains", config.trains)],
        further=lambda page: add_test_questions(page, measured, without_seeing),
    )
    print(f"report      {page.write(folder / 'report.html')}")


def finish(config: Any, task: MofTask, model: nnx.Module, workdir: pathlib.Path) -> None:
    """After training: the report, and the result as a folder that was loaded back and compared: see
    `results.write`.

    Raises:
      CheckpointError: the folder cannot be written, or its model gives other logits.
    """
    from perception_jax.systems.mof import results

    report(config, task, model, workdir)
    loaded = dataclasses.replace(task.base, model=model, weights=None)
    print(f"checkpoint  {results.write(loaded, task.config.trains, workdir, probed=_PROBED)}")


def _compare_schedule(config: Any, records: Source) -> None:
    """Warns if the schedule is that of another number of records."""
    expected = _division(config).updates(len(records), config.epochs)
    if config.train.steps != expected:
        _log.warning(
            "train.steps is %d, but %d epoch(s) of %d records are %d updates of %d rows: give the "
            "config :samples=%d for the schedule of these data.",
            config.train.steps,
            config.epochs,
            len(records),
            expected,
            config.train.batch_size,
            len(records),
        )


def _division(config: Any) -> Any:
    from perception_jax.data.grouping import Division

    return Division(**config.division)


def _drawn(config: Any) -> tuple[str, ...]:
    """Parts of the model whose weights are drawn."""
    from perception_jax.systems.mof.task import PROJECTORS

    return () if config.model.whole or config.model.language else ("language", *PROJECTORS)


def _chats(config: Any, base: Loaded, records: Source, *, test: bool = False) -> ImageChats:
    from perception_jax.data.image_chats import ImageChats

    settings = config.data
    return ImageChats(
        records,
        _transform(config, base, records, test=test),
        lengths=tuple(settings.lengths),
        division=_division(config),
        order="random" if test else settings.order,
        seed=config.train.seed,
        workers=settings.workers,
        in_memory=settings.hold,
        max_bad_fraction=settings.max_bad_fraction,
    )


def _transform(config: Any, base: Loaded, records: Source, *, test: bool) -> ImageChatTransform:
    from perception_jax.data.conversation import for_images
    from perception_jax.data.image_chats import ImageChatTransform
    from perception_jax.systems.mof.features import (
        compare_images,
        kept_features,
        opened_features,
    )
    from perception_jax.systems.mof.records import pictured

    settings, tokenizer = config.data, base.processor.tokenizer
    folders = config.evaluation.features if test else settings.features
    shown = pictured(config) if settings.keep and not test else records
    if settings.keep and not test and not folders:
        features = kept_features(settings.keep, base, shown)
    else:
        features = opened_features(folders, base.config)
    compare_images(features, base.processor.image, shown)
    return ImageChatTransform(
        tokenizer=tokenizer,
        processor=base.processor.image,
        template=for_images(settings.template, tokenizer.chat_template),
        vocab_size=base.config.language.vocab_size,
        max_length=settings.max_length,
        image_tokens=base.config.tokens_per_image,
        max_images=settings.max_images,
        features=features,
    )


def _evaluators(config: Any, base: Loaded) -> dict[str, Evaluator]:
    from perception_jax.inference.held_out import HeldOutLoss
    from perception_jax.systems.mof.records import conversations, test_questions
    from perception_jax.systems.mof.task import chat_predictions

    records = conversations(config, test=True)
    if records is None:
        return {}
    predictions = chat_predictions(
        batch_size=config.evaluation.batch_size,
        dtype=config.train.compute_dtype,
        chunk=config.chunk,
    )
    held_out = HeldOutLoss(predictions, _chats(config, base, records, test=True))
    asked = exact_answers(config, base, test_questions(config), predictions)
    return {HELD_OUT: held_out, **asked}


def exact_answers(
    config: Any,
    base: Loaded,
    questions: Mapping[str, Source],
    predictions: TokenPredictions,
) -> dict[str, ExactAnswers]:
    """The evaluators of sets of test questions; see `records.test_questions`."""
    from perception_jax.systems.mof.answers import ExactAnswers
    from perception_jax.systems.mof.records import PAIRS

    return {
        name: ExactAnswers(
            predictions,
            _chats(config, base, records, test=True),
            records,
            together=2 if name.startswith(PAIRS) else 1,
        )
        for name, records in questions.items()
    }
