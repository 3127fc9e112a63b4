"""`load`: a checkpoint of any layout to a model with its processor."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from perception_jax.api.loaded import Loaded, Processor
from perception_jax.api.locate import find
from perception_jax.data import processor_formats
from perception_jax.data.processors import ImageProcessor
from perception_jax.errors import CheckpointError
from perception_jax.interop.checkpoint_dir import read_json
from perception_jax.interop.load import load_params
from perception_jax.interop.source import OPEN_CLIP_CONFIG, Source, open_source
from perception_jax.models.architecture import Files
from perception_jax.models.identify import Identified, identify
from perception_jax.models.params import flatten, unflatten
from perception_jax.shard.rules import shardings as make_shardings


def load(
    source: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    section: str | None = None,
    prefix: str = "",
    dtype: np.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Loaded:
    """Loads a checkpoint.

    Args:
      source: a folder, a file with weights (`.safetensors`, `.bin`, `.pth`, `.pt`), the name of
        weights in the package (`SHIPPED`), or a hub id ("openai/clip-vit-base-patch16"; needs the
        extra [hub] and a connection).
      config: the settings, or a JSON file or folder with them. None looks beside the weights;
        DINOv2's own files and OpenAI's archives need none.
      section: for torch files that hold several state dicts, the dotted name of one ("teacher").
      prefix: loads a part of a larger checkpoint: the tensors whose names begin so. Without a
        temperature among them it is the image tower, e.g. a LLaVA's with
        `prefix="model.vision_tower.vision_tower."`, or a CLIP's with `prefix="vision_model."`.
      dtype: of the floating leaves; None keeps what the file stores.
      mesh: places each leaf on it by the model's sharding rules, tensor by tensor.

    Raises:
      CheckpointError: nothing to load there, damaged or refused files, or names and shapes that do
        not fit.
      ConfigError: an architecture that is not built here, or settings that make no sense.
    """
    found = open_source(find(source), config=config, section=section, prefix=prefix)
    shapes = {name: spec.shape for name, spec in found.files.specs.items()}
    model = identify(found.settings, found.layout, shapes, part=bool(prefix))
    if model is None:
        raise CheckpointError(
            f"expected config.json (Hugging Face, timm) or {OPEN_CLIP_CONFIG} beside the weights "
            f"of {found.path}, found neither, and the names of its {len(shapes)} tensors (e.g. "
            f"{', '.join(list(shapes)[:3])}) do not tell the model. Give the settings as `config`."
        )
    arch = model.architecture
    abstract_model = nnx.eval_shape(lambda: arch.build(model.config, rngs=nnx.Rngs(params=0)))
    abstract = flatten(abstract_model)
    loaded = load_params(
        arch.table(model.layout, model.config, abstract),
        found.files,
        abstract,
        dtype=dtype,
        shardings=None if mesh is None else make_shardings(abstract, arch.shardings, mesh),
    )
    return Loaded(
        model=unflatten(abstract_model, loaded.params),
        config=model.config,
        processor=_read_processor(found, model),
        report=dataclasses.replace(loaded.report, aside=found.aside),
    )


def _read_processor(found: Source, model: Identified) -> Processor:
    arch = model.architecture
    tokenizer = None
    if arch.read_tokenizer is not None:
        files = Files(folders=found.folders, settings=found.settings, layout=model.layout)
        tokenizer = arch.read_tokenizer(files, model.config)
    return Processor(image=_read_image_processor(found, model), tokenizer=tokenizer)


def _read_image_processor(found: Source, model: Identified) -> ImageProcessor | None:
    make = model.architecture.image_processor
    if make is None:
        return None
    default = make(model.config, model.layout)
    given = {"size": default.size, "mean": default.mean, "std": default.std}
    if found.layout == "timm":
        settings = found.settings.get("pretrained_cfg", found.settings)
        return processor_formats.from_timm(settings, **given)
    if found.layout == "reference" and "preprocess_cfg" in found.settings:
        return processor_formats.from_open_clip(found.settings["preprocess_cfg"], **given)
    for folder in found.folders:
        if (file := folder / "preprocessor_config.json").is_file():
            return ImageProcessor.from_hf(read_json(file))
    return default
