"""A small CLIP trained from scratch on scenes; its weights ship as "scenes-clip".

    python -m launch.train --config=configs/clip/scenes.py --workdir=runs/scenes_clip

Images of four artists, captions from the scene's own facts. Evaluated while it trains on the fifth
artist's drawings, which it never sees: naming among all training names, naming of the held-out
concepts, and retrieval of composed scenes.

`--config=configs/clip/scenes.py:runlocal` is the same in a few steps on a tiny model.
`--config.data.source=DIR` trains on your own images with captions instead (see `data.sources`).
"""

from __future__ import annotations

import pathlib

import ml_collections

from configs.common import parse_arg, trainer

SCENES = "scenes"
OPTIM = {
    "name": "muon",
    "learning_rate": 2e-3,
    "weight_decay": 0.1,
    "b2": 0.98,
    # The matrices of the blocks take larger steps than embeddings and projections.
    "rules": (
        (r"(^|/)(bias|scale|logit_scale|logit_bias)$", 1.0, False),
        (r"(^|/)blocks/.*kernel$", 3.0),
        (r".*",),
    ),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The shipped model's recipe; the argument `runlocal` shrinks everything."""
    tiny = parse_arg(arg, runlocal=False).runlocal
    config = ml_collections.ConfigDict()
    config.train = trainer(
        steps=12 if tiny else 9000,
        batch_size=32 if tiny else 128,
        log_every=4 if tiny else 50,
        evaluate_every=0 if tiny else 1000,
        checkpoint_every=0 if tiny else 250,
        optim={
            **OPTIM,
            "warmup_steps": 4 if tiny else 200,
        },
    )
    config.model = ml_collections.ConfigDict(
        {
            "image_size": 48,
            "patch_size": 12,
            "width": 32 if tiny else 160,
            "depth": 2 if tiny else 4,
            "text_width": 32 if tiny else 96,
            "text_depth": 1 if tiny else 2,
            "embed_dim": 32 if tiny else 128,
            "vocab_size": 4096,
            "context": 24,
        }
    )
    config.loss = "softmax"
    config.data = ml_collections.ConfigDict(
        {
            # "scenes", or a folder or file of your own that `data.sources.open_source` reads.
            "source": SCENES,
            # Its kind (see `data.sources`); "" guesses it where there is no doubt.
            "kind": "",
            # Share of the records that may be skipped as unusable, in training and evaluation.
            "max_bad_fraction": 0.01,
            # Different scenes; they stay in memory (about 8 KB each at 48 px) and come again in
            # every epoch. `min_area` below 1 crops at random, for images of your own.
            "length": 500 if tiny else 80_000,
            "min_area": 1.0,
            # Of eight scenes, how many show one large object; the others show up to `objects`.
            "singles": 7,
            "objects": 4,
            # How often the plain caption, the detailed one and the one without names are drawn.
            "caption_weights": (9.0, 1.0, 0.0),
            # Loading processes; 0 loads in threads, which share the scenes in memory.
            "workers": 0,
        }
    )
    # Portraits of each name and composed scenes in the evaluations.
    config.evaluation = ml_collections.ConfigDict(
        {"per_name": 1 if tiny else 4, "scenes": 40 if tiny else 500}
    )
    return config


def get_task(config: ml_collections.ConfigDict, loaded=None):
    """The contrastive task of this config.

    Args:
      loaded: a checkpoint from `perception_jax.load` to evaluate; its model, processor and
        tokenizer then replace the config's.
    """
    from perception_jax.data.processors import ImageProcessor
    from perception_jax.data.tokenization import ClipTokenizer
    from perception_jax.systems.contrastive.task import ContrastiveConfig, ContrastiveTask

    model, data = config.model, config.data
    if loaded is None:
        clip = clip_config(model)
        processor = ImageProcessor(size=model.image_size)
        tokenizer = ClipTokenizer.shipped(model.vocab_size, model.context)
    else:
        clip = loaded.config
        processor, tokenizer = loaded.processor.image, loaded.processor.tokenizer
    source, benchmark = _source_and_benchmark(config, processor, tokenizer)
    return ContrastiveTask(
        ContrastiveConfig(
            loss=config.loss,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            workers=data.workers,
            caption_weights=data.caption_weights,
            min_area=data.min_area,
            max_bad_fraction=data.max_bad_fraction,
        ),
        clip,
        processor=processor,
        tokenizer=tokenizer,
        source=source,
        benchmark=benchmark,
    )


def report(config: ml_collections.ConfigDict, task, model, folder: pathlib.Path) -> None:
    """Evaluates and writes `results.json` and `report.html` into `folder`."""
    from perception_jax.systems.contrastive import conclude

    own = "your images" if config.data.source != SCENES else "drawings"
    conclude.report(
        task, model, folder, config=config.to_dict(), title=f"A small CLIP, trained on {own}"
    )


def finish(config: ml_collections.ConfigDict, task, model, workdir: pathlib.Path) -> None:
    """After training: the report, and a Hugging Face folder `workdir/hf` that loads back."""
    from perception_jax.systems.contrastive import conclude

    report(config, task, model, workdir)
    conclude.export_and_verify(task, model, workdir / "hf")


def _source_and_benchmark(config: ml_collections.ConfigDict, processor, tokenizer):
    from perception_jax.data.sources import open_source
    from perception_jax.data.sources.combine import split
    from perception_jax.systems.contrastive import benchmark

    data = config.data
    if data.source == SCENES:
        source = benchmark.training_source(
            processor.size,
            seed=config.train.seed,
            length=data.length,
            singles=data.singles,
            objects=data.objects,
        )
        return source, benchmark.scenes_benchmark(processor, tokenizer, **config.evaluation)
    train, held_out = split(open_source(data.source, kind=data.kind), every=10)
    own = benchmark.own_benchmark(
        held_out, processor, tokenizer, max_bad_fraction=data.max_bad_fraction
    )
    return train, own


def clip_config(model: ml_collections.ConfigDict):
    """The model's dataclass: 32-wide heads, MLPs of four times the width."""
    from perception_jax.models.clip.config import ClipConfig, TextConfig, VisionConfig

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
