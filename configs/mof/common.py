"""Settings shared by the configs that train a LLaVA, with one or two image towers.

The recipe is LLaVA-1.5's (arXiv 2310.03744) and that of Mixture of Features (arXiv 2401.06209, §4
and its training scripts): AdamW without weight decay, gradients clipped at 1, 3 % of warm-up from
0, cosine to 0, the mean over devices and micro-batches of each one's mean over tokens.
"""

from __future__ import annotations

import math
from typing import Any

import ml_collections

from configs.common import trainer
from launch.common import UsageError

CLIP = {224: "openai/clip-vit-large-patch14", 336: "openai/clip-vit-large-patch14-336"}
"""Image towers by size of the images."""
DINOV2 = "facebook/dinov2-large"
VICUNA = {"7b": "lmsys/vicuna-7b-v1.5", "13b": "lmsys/vicuna-13b-v1.5"}
DEVICES = 8
"""GPUs of the published runs: of each the loss is averaged over its own tokens."""
DIVISIONS = {
    # Upstream LLaVA-1.5: 32 × 8 and 16 × 8. MoF's scripts: two micro-batches of 16 × 8 and 11 × 8.
    ("clip", 256): (32, 1),
    ("clip", 128): (16, 1),
    ("mof", 256): (16, 2),
    ("mof", 176): (11, 2),
    ("mof", 128): (16, 1),
}
"""Rows of a device and micro-batches by recipe and batch."""
LLAVA_558K = {
    "source": "playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
    "images": "playground/data/LLaVA-Pretrain/images",
    "samples": 558_128,
}
CC_595K = {
    "source": "playground/data/LLaVA-CC3M-Pretrain-595K/chat.json",
    "images": "playground/data/LLaVA-CC3M-Pretrain-595K/images",
    "samples": 595_375,
}
MIX_665K = {
    "source": "playground/data/llava_v1_5_mix665k.json",
    "images": "playground/data",
    "samples": 665_298,
}
"""Published data: files, folders of images, and their numbers of conversations."""
RATE, LORA_RATE, PROJECTOR_RATE = 2e-5, 2e-4, 2e-5
"""Learning rates of stage 2: of all weights; of LoRA, and of the projectors beside it."""
MODEL = {
    # A whole LLaVA (hub id or folder) to go on with; "" takes the parts below.
    "whole": "",
    # Hub id or folder; "" draws the weights of `scratch`.
    "language": "",
    # One or two image towers, or models that have one; of two the first one's size counts.
    "towers": (),
    "mixing": "single",  # "additive" (A-MoF) or "interleaved" (I-MoF)
    "mixing_ratio": 0.5,  # of the first tower in the sum
    "projector": "mlp2x_gelu",
    "select_layer": -2,
    "select_feature": "patch",
    "image_aspect": "square",  # or "pad"
    "image_size": 0,  # side of images, pixels; 0 is that of the first tower
}
"""Settings of `config.model`."""
DATA = {
    # "scenes", or a file of conversations: LLaVA's JSON, or JSON lines (`data.sources`).
    "source": "scenes",
    "kind": "",
    # Folder of the images; "" is that of the file.
    "images": "",
    # Test records; "" keeps every so many of the source, and 0 of them does not test.
    "test": "",
    "test_every": 0,
    # "auto" takes that of the tokenizer's files.
    "template": "vicuna_v1",
    # Tokens of a text at most, an image counted as one; what is longer is cut.
    "max_length": 2048,
    # Tokens of a row, those of its images included; each is compiled.
    "lengths": (),
    "max_images": 1,
    # "random", "length", or "modality": batches of images and of text alone.
    "order": "random",
    # Share of the records that may be skipped as unusable.
    "max_bad_fraction": 0.01,
    # Folder in which the features of all images are kept: frozen towers run once, and not in each
    # step. "" keeps none.
    "keep": "",
    # Folders of features from elsewhere, one for each image tower (`data.kept_features`).
    "features": (),
    # Loading processes; 0 loads in threads. `hold` keeps pixels and tokens in memory.
    "workers": 8,
    "hold": False,
    # Scenes only: how many, which ones (a seed), and the side of their images.
    "scenes": 0,
    "draw": 42,
    "canvas": 48,
    # Of each conversation so many single questions, as records of their own; 0 trains on whole
    # conversations.
    "each": 0,
    # Fields of `data.scenes.chats.ChatConfig`.
    "chats": {
        "objects": 4,
        "names": 0,
        "caption": 1.0,
        "detailed": 0.0,
        "turns": 2,
        "independent": False,
        "text_every": 8,
        "pairs": 0,
        "letters": 0.0,
    },
}
"""Settings of `config.data`."""
EVALUATION = {
    # Of "scenes": how many conversations test, how many pairs of each visual pattern, and how many
    # single questions.
    "scenes": 200,
    "pairs": 0,
    "questions": 0,
    "features": (),  # of the test records, as `data.features`
}
"""Settings of `config.evaluation`, beside `batch_size`, the rows of a call."""
SCRATCH = {
    # "bytes", "learned" from the conversations, or a folder.
    "tokenizer": "bytes",
    "vocab_size": 264,
    "context": 512,
    "width": 256,
    "depth": 6,
    "heads": 4,
    "kv_heads": 4,
    "head_width": 64,
    "mlp_dim": 768,
    "tied": False,
}
"""Settings of `config.scratch`, the language model where `config.model.language` is ""."""

_PATCH, _MULTIPLE = 14, 128
_MAX_LENGTH = 2048


def pretrain(
    recipe: str,
    *,
    size: str,
    pixels: int,
    batch: int,
    rate: float,
    samples: int,
    data: dict[str, Any],
    **model: Any,
) -> ml_collections.ConfigDict:
    """Stage 1: the projectors learn captions; the instructions are left out.

    Args:
      recipe: "clip" or "mof", for the division of the batch.
      size: of the language model, "7b" or "13b".
      pixels: side of the images.
      samples: conversations of an epoch; 0 for those of the published data.
      data: of the published ones above.
      model: settings of `model` that differ: `towers`, `mixing`, `mixing_ratio`.
    """
    config = base(
        model={"language": _language(size), "image_aspect": "square", **model},
        division=_division(recipe, batch),
        samples=samples or data["samples"],
        rate=rate,
        trains="projectors",
        tokens=_tokens(pixels, model),
        rooms=(64, 448),
    )
    config.data.update({"template": "plain", **_files(data)})
    return config


def finetune(
    recipe: str,
    *,
    size: str,
    pixels: int,
    batch: int,
    samples: int,
    lora: bool,
    order: str,
    **model: Any,
) -> ml_collections.ConfigDict:
    """Stage 2: the language model and the projectors learn conversations.

    Args:
      lora: LoRA of rank 128 instead of all weights of the language model.
      order: of an epoch, see `data.grouping.Order`.
      Others as of `pretrain`.
    """
    config = base(
        model={"language": _language(size), "image_aspect": "pad", **model},
        division=_division(recipe, batch),
        samples=samples or MIX_665K["samples"],
        rate=LORA_RATE if lora else RATE,
        trains="lora" if lora else "all",
        tokens=_tokens(pixels, model),
        rooms=(192, 448, 960),
    )
    config.data.update({"template": "vicuna_v1", "order": order, **_files(MIX_665K)})
    return config


def base(
    *,
    model: dict[str, Any],
    division: dict[str, int],
    samples: int,
    rate: float,
    trains: str,
    tokens: int,
    rooms: tuple[int, ...],
    max_length: int = _MAX_LENGTH,
    epochs: int = 1,
    **train: Any,
) -> ml_collections.ConfigDict:
    """All settings, for captions or conversations at `samples` an epoch.

    Args:
      tokens: of one image.
      rooms: for text, in rows shorter than the longest one.
      train: settings of the trainer that differ from the recipe's.
    """
    config = ml_collections.ConfigDict({"system": "mof", "model": {**MODEL, **model}})
    # Folder or file of trained projectors, e.g. WORKDIR/projectors of stage 1; "" draws new ones.
    config.projectors = ""
    # MoF's code starts stage 2 with the second tower's projector in both places; True does so too.
    config.reference_adapter_collision = False
    config.trains = trains  # "projectors", "all" or "lora"
    config.lora = ml_collections.ConfigDict(
        {"rank": 128, "alpha": 256.0, "dropout": 0.05, "rank_stabilized": False}
    )
    # Rows of a device, devices and micro-batches of the recipe: how records are grouped, and over
    # what losses are averaged. The run may have other devices.
    config.division = ml_collections.ConfigDict(division)
    config.epochs = epochs
    # False: the loss is the mean over all tokens of the batch (with micro-batches, set also
    # train.optim.accumulate_mean="tokens").
    config.device_mean = True
    config.train = _trainer(division, samples, epochs, rate=rate, trains=trains, **train)
    # What the backward pass recomputes: "none", "full", "dots" or "dots_no_batch" (`nn.stack`).
    config.remat = "full"
    # Tokens of each row whose logits are computed at a time.
    config.chunk = 256
    longest = _multiple(max_length + tokens - 1)
    lengths = sorted({min(_multiple(tokens + room), longest) for room in rooms} | {longest})
    own = {"max_length": max_length, "lengths": tuple(lengths), "scenes": samples}
    config.data = ml_collections.ConfigDict({**DATA, **own})
    config.evaluation = ml_collections.ConfigDict(
        {"batch_size": math.prod(division.values()), **EVALUATION}
    )
    config.scratch = ml_collections.ConfigDict(SCRATCH)
    return config


def _trainer(
    division: dict[str, int],
    samples: int,
    epochs: int,
    *,
    rate: float,
    trains: str,
    optim: dict[str, Any] | None = None,
    **settings: Any,
) -> ml_collections.ConfigDict:
    """The trainer's settings, with the schedule of so many epochs."""
    from perception_jax.data.grouping import Division

    steps = Division(**division).updates(samples, epochs)
    schedule = {
        "learning_rate": rate,
        "weight_decay": 0.0,
        "warmup_steps": math.ceil(steps * 0.03),
        "zero_start": True,
        **_rules(trains, rate),
        **(optim or {}),
    }
    own = {"compute_dtype": "bfloat16", "frozen_dtype": "bfloat16", "log_every": 10}
    return trainer(
        steps=steps,
        batch_size=math.prod(division.values()),
        optim=schedule,
        **{**own, "seed": 42, "checkpoint_every": 500, **settings},
    )


def _rules(trains: str, rate: float) -> dict[str, Any]:
    """The projectors beside LoRA have a learning rate of their own."""
    if trains != "lora":
        return {}
    return {"rules": ((r"projector/", PROJECTOR_RATE / rate), (r".*",))}


def _division(recipe: str, batch: int) -> dict[str, int]:
    known = [size for kind, size in DIVISIONS if kind == recipe]
    if (recipe, batch) not in DIVISIONS:
        raise UsageError(
            f"batch: expected one of {', '.join(map(str, known))}, found {batch}. Set "
            "config.division and train.batch_size for another one."
        )
    rows, accumulate = DIVISIONS[recipe, batch]
    return {"rows": rows, "devices": DEVICES, "accumulate": accumulate}


def _language(size: str) -> str:
    if size not in VICUNA:
        raise UsageError(f"size: expected {' or '.join(VICUNA)}, found {size!r}.")
    return VICUNA[size]


def clip(pixels: int) -> str:
    """The image tower for images of this size."""
    if pixels not in CLIP:
        raise UsageError(f"pixels: expected {' or '.join(map(str, CLIP))}, found {pixels}.")
    return CLIP[pixels]


def _tokens(pixels: int, model: dict[str, Any]) -> int:
    one = (pixels // _PATCH) ** 2
    return 2 * one if model.get("mixing") == "interleaved" else one


def _multiple(length: int) -> int:
    """Lengths that fused attention on TPU takes."""
    return -(-length // _MULTIPLE) * _MULTIPLE


def _files(data: dict[str, Any]) -> dict[str, str]:
    return {"source": data["source"], "images": data["images"], "kind": "llava"}
