"""The front door: `load` a checkpoint from a folder, a file, the hub or the package, `export` one.

Four layouts are read and written:

- "hf": `config.json`, safetensors, `preprocessor_config.json`, tokenizer files; `transformers`
  loads the folder unchanged;
- "reference": the authors' names; open_clip loads the folder (`open_clip_config.json`), and for
  DINOv2, which has no settings, `load_state_dict` of the authors' model its one file;
- "timm": timm's names and `config.json`, for DINOv2 and for image towers alone;
- "jax": our own leaf paths (`vision/blocks/attention/q_proj/kernel`), with the settings of "hf" or
  of what else the architecture has.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from perception_jax.data import images as image_files
from perception_jax.data import processor_formats
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Image
from perception_jax.data.tokenization import ClipTokenizer, ForeignVocabularyError, SiglipTokenizer
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.interop import hub
from perception_jax.interop.checkpoint_dir import (
    OPEN_CLIP_SINGLE,
    SINGLE,
    WEIGHT_SUFFIXES,
    read_json,
)
from perception_jax.interop.export import export_params
from perception_jax.interop.load import load_params
from perception_jax.interop.report import KeyReport
from perception_jax.interop.rules import RuleTable, identity_table
from perception_jax.interop.source import OPEN_CLIP_CONFIG, Layout, Source, open_source
from perception_jax.interop.writer import MAX_SHARD, write_checkpoint
from perception_jax.models.identify import Identified, identify
from perception_jax.models.params import flatten, unflatten
from perception_jax.models.registry import Architecture, architecture_of
from perception_jax.ops.image import normalise
from perception_jax.shard.rules import shardings as make_shardings

SHIPPED = ("scenes-clip",)
"""Weights inside the package, by name."""

Tokenizer = ClipTokenizer | SiglipTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor:
    """Raw images and texts to what the model takes.

    Attributes:
      image: resize and crop on the host, and the mean and standard deviation.
      tokenizer: None if the checkpoint carries no vocabulary, or one that is not read here.
    """

    image: ImageProcessor
    tokenizer: Tokenizer | None

    def images(self, images: Sequence[Image]) -> Float[Array, "B S S 3"]:
        """Decodes (arrays, bytes or paths), processes and normalises.

        Raises:
          ImageError: an image cannot be decoded.
        """
        pixels = np.stack([self.image(image_files.decode(image)).pixels for image in images])
        return normalise(jax.numpy.asarray(pixels), self.image.mean, self.image.std)

    def texts(self, texts: Sequence[str]) -> Int[Array, "B T"]:
        """Token ids, padded to the context length.

        Raises:
          CheckpointError: the checkpoint came without a tokenizer.
        """
        if self.tokenizer is None:
            raise CheckpointError(
                "this checkpoint came without a tokenizer that is read here: expected CLIP's (a "
                "tokenizer.json, or vocab.json and merges.txt) or SigLIP's (tokenizer.json or "
                "spiece.model) in its folder. Add the files and load again, or pass token ids."
            )
        return jax.numpy.asarray(self.tokenizer(texts).ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with all that is needed to use it and to write it again.

    Attributes:
      model: the NNX module.
      config: its frozen dataclass, e.g. `ClipConfig`.
      processor: of images and texts.
      report: what happened to each of the checkpoint's keys; None for a model not read from one.
    """

    model: nnx.Module
    config: Any
    processor: Processor
    report: KeyReport | None = None


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
        _table(arch, model.layout, model.config, abstract),
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


def export(
    loaded: Loaded,
    directory: str | os.PathLike[str],
    *,
    layout: Layout = "hf",
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder, whole or not at all.

    Args:
      loaded: from `load`, or built around a model of your own.
      directory: new or empty, unless `overwrite`.
      layout: see the module.

    Raises:
      CheckpointError: the folder is not empty, the disk is full, or the layout has no place for
        one of the leaves.
      ConfigError: the layout cannot express the configuration.
    """
    arch = architecture_of(loaded.config)
    write = arch.write_config.get(arch.settings_layout(layout))
    if write is None:
        known = [*arch.write_config, *(["jax"] if "hf" in arch.write_config else [])]
        raise ConfigError(
            f"{arch.name} has no configuration file in the layout {layout!r}; it has: "
            f"{', '.join(dict.fromkeys(known))}. Use one of these."
        )
    params = flatten(loaded.model)
    settings = write(loaded.config)
    if layout == "hf":
        settings = settings | _mixed_dtype(params)
    files = _settings_files(arch, layout, settings, loaded.processor.image)
    write_checkpoint(
        directory,
        export_params(_table(arch, layout, loaded.config, params), params),
        extras=files | _tokenizer_files(loaded.processor.tokenizer),
        # open_clip and timm read no shards, and open_clip looks for a name of its own.
        weights=OPEN_CLIP_SINGLE if OPEN_CLIP_CONFIG in files else SINGLE,
        max_shard_bytes=MAX_SHARD if layout in ("hf", "jax") else 2**63,
        overwrite=overwrite,
    )


def table_of(loaded: Loaded, layout: Layout) -> RuleTable:
    """The name rules by which `export` writes a model in a layout."""
    return _table(architecture_of(loaded.config), layout, loaded.config, flatten(loaded.model))


def _mixed_dtype(params: Mapping[str, Any]) -> dict[str, str]:
    """The dtype that holds all leaves, where they differ: transformers loads every leaf as the
    first one in the file unless the settings say otherwise."""
    dtypes = {x.dtype for x in params.values() if jnp.issubdtype(x.dtype, jnp.floating)}
    return {"torch_dtype": jnp.result_type(*dtypes).name} if len(dtypes) > 1 else {}


def _settings_files(
    arch: Architecture, layout: Layout, settings: dict[str, Any] | None, image: ImageProcessor
) -> dict[str, Any]:
    if settings is None:
        return {}
    if layout == "reference":
        preprocess = processor_formats.to_open_clip(image)
        return {OPEN_CLIP_CONFIG: {"model_cfg": settings, "preprocess_cfg": preprocess}}
    if layout == "timm":
        weights = settings["pretrained_cfg"] | processor_formats.to_timm(image)
        return {"config.json": settings | {"pretrained_cfg": weights}}
    if layout == "jax":
        settings = settings | {"perception_jax_layout": "jax", "model_type": arch.name}
    return {"config.json": settings, "preprocessor_config.json": image.to_hf()}


def find(source: str | os.PathLike[str]) -> pathlib.Path:
    """The folder or file of a checkpoint: a path, the name of shipped weights, or a hub id, which
    is fetched.

    Raises:
      CheckpointError: there is no such thing.
    """
    path = pathlib.Path(source)
    if path.is_dir():
        return path
    name = os.fspath(source)
    if name in SHIPPED:
        return shipped_folder(name)
    if path.is_file():
        return path
    if name.count("/") != 1 or name.startswith((".", "/")) or name.endswith(WEIGHT_SUFFIXES):
        raise CheckpointError(
            f"{name!r} is neither a folder or file, nor shipped weights ({', '.join(SHIPPED)}), "
            "nor a hub id of the form owner/name."
        )
    return hub.fetch(name)


def shipped_folder(name: str) -> pathlib.Path:
    """Where weights of that name lie in the package."""
    return pathlib.Path(str(importlib.resources.files("perception_jax") / "weights" / name))


def _table(arch: Architecture, layout: str, config: Any, leaves: Mapping[str, Any]) -> RuleTable:
    return identity_table(leaves) if layout == "jax" else arch.tables[layout](config)


def _read_processor(found: Source, model: Identified) -> Processor:
    arch, layout = model.architecture, model.layout
    image = _read_image_processor(found, model)
    tokenizer = None
    if arch.tokenizer is not None:
        tokenizer = _read_tokenizer(found, arch, arch.context(model.config), layout)
    return Processor(image=image, tokenizer=tokenizer)


def _read_image_processor(found: Source, model: Identified) -> ImageProcessor:
    arch = model.architecture
    defaults = {"size": arch.image_size(model.config), "mean": arch.mean, "std": arch.std}
    if found.layout == "timm":
        settings = found.settings.get("pretrained_cfg", found.settings)
        return processor_formats.from_timm(settings, **defaults)
    if found.layout == "reference" and "preprocess_cfg" in found.settings:
        return processor_formats.from_open_clip(found.settings["preprocess_cfg"], **defaults)
    for folder in found.folders:
        if (file := folder / "preprocessor_config.json").is_file():
            return ImageProcessor.from_hf(read_json(file))
    # What the authors' code does: torchvision's crop, or Hugging Face's.
    mode = "tv_crop" if model.layout in ("reference", "timm") else "hf_crop"
    return ImageProcessor(mode=mode, resize=arch.resize, **defaults)


def _read_tokenizer(
    found: Source, arch: Architecture, context: int, layout: str
) -> Tokenizer | None:
    def holding(*names: str) -> pathlib.Path | None:
        folders = (f for f in found.folders if any((f / name).is_file() for name in names))
        return next(folders, None)

    if arch.tokenizer == "siglip":
        folder = holding("tokenizer.json", "spiece.model")
        clean = "open_clip" if layout == "reference" else "hf"
        try:
            return folder and SiglipTokenizer.from_directory(folder, context, clean)
        except ForeignVocabularyError:  # SigLIP 2 has Gemma's
            return None
    if (folder := holding("tokenizer.json", "vocab.json")) is not None:
        return ClipTokenizer.from_directory(folder, context)
    # The authors' code brings its vocabulary along; checkpoints do not carry it.
    return ClipTokenizer.shipped(context=context, pad_id=0) if layout == "reference" else None


def _tokenizer_files(tokenizer: Tokenizer | None) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return {item.name: item.read_bytes() for item in pathlib.Path(folder).iterdir()}
