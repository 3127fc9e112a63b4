"""`load`: reads a checkpoint in any layout as a model with its processor."""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from perception_jax.api.joined import JoinedWeights
from perception_jax.api.loaded import LazyWeights, Loaded, Processor
from perception_jax.api.locate import find, is_repository
from perception_jax.data import processor_formats
from perception_jax.data.processors import ImageProcessor
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.interop import hub
from perception_jax.interop.checkpoint_dir import read_json
from perception_jax.interop.checkpoint_source import (
    OPEN_CLIP_CONFIG,
    CheckpointSettings,
    CheckpointSource,
    open_source,
    read_settings,
)
from perception_jax.interop.dtypes import floating_dtype
from perception_jax.interop.load import Convert, LoadedParams, load_params
from perception_jax.interop.rules import Ignore, RuleTable
from perception_jax.models import registry
from perception_jax.models.architecture import Files, Tokenizer
from perception_jax.models.identify import Identified, identify
from perception_jax.models.params import flatten
from perception_jax.models.registry import architecture_of
from perception_jax.models.towers import TowerConfig
from perception_jax.settings import shown

_log = logging.getLogger(__name__)

_PROCESSOR = "processor_config.json"
"""File of transformers 5, with the image processor's settings under "image_processor"."""
_PREPROCESSOR = "preprocessor_config.json"
"""File of the image processor's settings of older transformers."""
_TOWER_NAMES = ("vision_model.", "visual.", "vision/")
"""Where names of the image tower begin in models that have one, by layout."""
_BESIDE_LORA = "non_lora_trainables.bin"
"""File of what LLaVA's code trains beside LoRA."""
_PEFT = "adapter_config.json"
"""File with which transformers finds adapters and applies them."""


def load(
    source: Any,
    *,
    config: Any = None,
    section: Any = None,
    prefix: Any = "",
    dtype: Any = None,
    mesh: Any = None,
    int8: Any = False,
) -> Loaded:
    """Loads a checkpoint.

    Args:
      source: a folder, a file with weights (`.safetensors`, `.bin`, `.pth`, `.pt`), the name of
        weights in the package (`SHIPPED`), or a hub id ("openai/clip-vit-base-patch16"; one file
        or folder of a repository as "owner/name:file.pth"; needs the extra [hub] and a
        connection).
      config: the settings, or a JSON file or folder with them. None searches next to the weights;
        DINOv2's own files and OpenAI's archives need none.
      section: for torch files that hold several state dicts, the dotted name of one ("teacher").
      prefix: loads a part of a larger checkpoint: the tensors whose names begin so. Without a
        temperature among them it is the image tower, e.g. a LLaVA's with
        `prefix="model.vision_tower.vision_tower."`, or a CLIP's with `prefix="vision_model."`.
      dtype: of the floating leaves, by name ("bfloat16", "bf16", "torch.float16") or as a NumPy,
        JAX or torch dtype; None keeps what the file stores.
      mesh: places each leaf on it by the model's sharding rules, tensor by tensor.
      int8: quantizes the kernels of all linear layers (`nn.quantize_linear`), each from the stored
        dtype as soon as it is read: devices never hold more than the int8 model and one floating
        leaf. `dtype` is then that of the other leaves. For inference: such a model is neither
        trained nor exported.

    Raises:
      CheckpointError: nothing to load there, damaged or refused files, or names and shapes that do
        not fit.
      ConfigError: an architecture that is not supported, settings that make no sense, or a dtype
        in which models do not run; with `int8`, a model without linear layers, or weights of one
        that are integers, NaN or infinite.
    """
    _check_arguments(config, section, prefix, mesh)
    dtype = None if dtype is None else floating_dtype(dtype)
    if not isinstance(int8, bool):
        raise ConfigError(f"int8: expected True or False, found {shown(int8)}.")
    opened = prepare(source, config=config, section=section, prefix=prefix)
    return opened.load_weights(dtype=dtype, mesh=mesh, int8=int8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Weights:
    """The weights of a checkpoint; see `LazyWeights`.

    Attributes:
      leaves: shape and dtype of each leaf by its path.
      table: the name rules.
      rules: for a mesh.
      found: the files.
      processor_files: where the parts of the processor come from, for the report.
    """

    leaves: Mapping[str, jax.ShapeDtypeStruct]
    table: RuleTable
    rules: tuple[tuple[str, Any], ...]
    found: CheckpointSource
    processor_files: Mapping[str, str]

    def read(
        self,
        *,
        dtype: np.dtype | None = None,
        shardings: Mapping[str, jax.sharding.Sharding] | None = None,
        targets: Mapping[str, jax.ShapeDtypeStruct] | None = None,
        convert: Mapping[str, Convert] | None = None,
    ) -> LoadedParams:
        loaded = load_params(
            self.table,
            self.found.files,
            self.leaves,
            dtype=dtype,
            shardings=shardings,
            targets=targets,
            convert=convert,
        )
        report = dataclasses.replace(
            loaded.report,
            aside=self.found.aside,
            read={**self.found.read, **self.processor_files},
            left=self.found.left,
        )
        return dataclasses.replace(loaded, report=report)


def prepare(source: Any, *, config: Any = None, section: Any = None, prefix: Any = "") -> Loaded:
    """Finds a checkpoint and reads its settings and names, but not its weights: the model has
    shapes for leaves, and `Loaded.read` and `Loaded.load_weights` read them.

    Args, Raises: as of `load`.
    """
    _check_arguments(config, section, prefix, None)
    path = find(source)
    _refuse_llava_lora(path)
    found = open_source(path, config=config, section=section, prefix=prefix)
    shapes = {name: spec.shape for name, spec in found.files.specs.items()}
    elsewhere: dict[str, LazyWeights] = {}
    if not prefix:
        found, elsewhere = _with_elsewhere(found, shapes)
    model = identify(found.settings, found.layout, shapes, part=bool(prefix))
    if model is None:
        raise CheckpointError(
            f"expected config.json (Hugging Face, timm) or {OPEN_CLIP_CONFIG} next to the weights "
            f"of {found.path}, found neither, and the names of its {len(shapes)} tensors (e.g. "
            f"{', '.join(list(shapes)[:3])}) do not identify the model. Give the settings as "
            "`config`."
        )
    for folder in found.folders:
        if (folder / _PEFT).is_file():
            _log.warning(
                "%s: adapters of PEFT are next to the weights. transformers applies them, they are "
                "not applied here: merge them into the weights first (`merge_and_unload`).",
                folder / _PEFT,
            )
    image, image_from = _read_image_processor(found, model)
    tokenizer = _read_tokenizer(found, model)
    arch = model.architecture
    abstract = nnx.eval_shape(lambda: arch.build(model.config, rngs=nnx.Rngs(params=0)))
    leaves = flatten(abstract)
    weights: LazyWeights = _Weights(
        leaves={p: x for p, x in leaves.items() if not p.startswith(tuple(elsewhere))},
        table=arch.table(model.layout, model.config, leaves),
        rules=arch.shardings,
        found=found,
        processor_files={"image processor": image_from, "tokenizer": _tokenizer_from(tokenizer)},
    )
    if elsewhere:
        weights = JoinedWeights(parts={"": weights, **elsewhere}, rules=arch.shardings)
    return Loaded(
        model=abstract,
        config=model.config,
        processor=Processor(image=image, tokenizer=tokenizer),
        name=os.fspath(source),
        weights=weights,
    )


def describe(source: Any) -> tuple[Any, Processor]:
    """Reads the configuration and the processor of a checkpoint, and no weights.

    Of a hub id only the settings are fetched if they say it all.

    Args:
      source: as of `load`.

    Raises:
      CheckpointError, ConfigError: as `load`.
    """
    if is_repository(source):
        found = read_settings(hub.fetch_settings(source))
        model = found and identify(found.settings, found.layout, {})
        # Of the authors' layout of a LLaVA, names tell more than settings.
        whole = model is not None and model.layout == "reference" and model.architecture.elsewhere
        if model is not None and not whole:
            image, _ = _read_image_processor(found, model)
            return model.config, Processor(image=image, tokenizer=_read_tokenizer(found, model))
    opened = prepare(source)
    return opened.config, opened.processor


def prepare_tower(source: Any) -> Loaded:
    """Opens the image tower of a checkpoint, without a projection to a joint space.

    Args:
      source: as of `load`: an image tower, or a model that has one.

    Raises:
      CheckpointError, ConfigError: as `load`.
    """
    names = open_source(find(source)).files
    begins = (p for p in _TOWER_NAMES if any(name.startswith(p) for name in names))
    opened = prepare(source, prefix=next(begins, ""))
    if not isinstance(opened.config, TowerConfig) or opened.config.embed_dim is None:
        return opened
    config = dataclasses.replace(opened.config, embed_dim=None)
    build = architecture_of(config).build
    model = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(params=0)))
    table = opened.weights.table
    ignored = tuple(
        Ignore(name, "projection to a joint space")
        for rule in table.rules
        if rule.targets[0].startswith("projection/")
        for name in rule.sources
    )
    weights = dataclasses.replace(
        opened.weights,
        leaves=flatten(model),
        table=dataclasses.replace(table, ignored=(*table.ignored, *ignored)),
    )
    return dataclasses.replace(opened, model=model, config=config, weights=weights)


def _refuse_llava_lora(path: pathlib.Path) -> None:
    """Names the function that reads the authors' folder of a LLaVA's LoRA."""
    if path.is_dir() and (path / _PEFT).is_file() and (path / _BESIDE_LORA).is_file():
        raise CheckpointError(
            f"{path}: expected a whole model, found LoRA with a projector ({_BESIDE_LORA}). Read "
            "it with `api.load_llava_lora`, which brings language model and image tower."
        )


def _with_elsewhere(
    found: CheckpointSource, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[CheckpointSource, dict[str, LazyWeights]]:
    """Adds the settings of parts that a checkpoint only names, and opens their weights."""
    name = found.settings.get("model_type") if found.layout == "hf" else None
    arch = registry.find(name) if isinstance(name, str) else None
    weights: dict[str, LazyWeights] = {}
    if arch is None or arch.elsewhere is None:
        return found, weights
    if not any(".layers." in name for name in shapes) and any("projector." in n for n in shapes):
        raise CheckpointError(
            f"{found.path}: expected a whole model, found {len(shapes)} tensors of its projectors "
            "alone. Put them on a language model and an image tower with `api.assemble_llava(…, "
            "projectors=…)`."
        )
    settings = dict(found.settings)
    for part in arch.elsewhere(found.settings, shapes):
        _log.info("%s: %s is read from %s", found.path, part.key, part.source)
        opened = prepare_tower(part.source)
        own = architecture_of(opened.config)
        written = own.write_config[own.settings_layout("jax")](opened.config)
        settings[part.key] = {**written, "model_type": own.name, **part.settings}
        weights[part.path] = opened.weights
    return dataclasses.replace(found, settings=settings), weights


def _check_arguments(config: Any, section: Any, prefix: Any, mesh: Any) -> None:
    expected = {
        "config": (config, None | str | os.PathLike | Mapping, "a file, a folder or a mapping"),
        "section": (section, None | str, "a string"),
        "prefix": (prefix, str, "a string"),
        "mesh": (mesh, None | jax.sharding.Mesh, "a jax.sharding.Mesh"),
    }
    for name, (value, kind, described) in expected.items():
        if not isinstance(value, kind):
            raise ConfigError(f"{name}: expected {described}, found {shown(value)}.")


def _read_tokenizer(found: CheckpointSettings, model: Identified) -> Tokenizer | None:
    read = model.architecture.read_tokenizer
    if read is None:
        return None
    files = Files(folders=found.folders, settings=found.settings, layout=model.layout)
    return read(files, model.config)


def _tokenizer_from(tokenizer: Tokenizer | None) -> str:
    return "none" if tokenizer is None else type(tokenizer).__name__


def _read_image_processor(
    found: CheckpointSettings, model: Identified
) -> tuple[ImageProcessor | None, str]:
    """The image processor, and the file that describes it."""
    usual = model.architecture.image_settings
    if usual is None:
        return None, "none"
    default = ImageProcessor(**usual(model.config, model.layout))
    settings_file = found.read.get("settings", "the settings")
    if found.layout == "timm":
        default = processor_formats.with_decoding(default, found.settings)
        settings = found.settings.get("pretrained_cfg", found.settings)
        return processor_formats.from_timm(settings, default), settings_file
    if found.layout == "reference" and "preprocess_cfg" in found.settings:
        default = processor_formats.with_decoding(default, found.settings)
        settings = found.settings["preprocess_cfg"]
        return processor_formats.from_open_clip(settings, default), settings_file
    for folder in found.folders:
        if (file := _hf_processor(folder)) is not None:
            image = ImageProcessor.from_hf(read_json(file), default)
            if image.size != default.size:
                _log.warning(
                    "%s makes images of %d pixels, usual for this model are %d; its position "
                    "embeddings are resized where they differ. `Loaded.at_size` chooses.",
                    file,
                    image.size,
                    default.size,
                )
            return image, str(file)
    return default, f"no file: the default of {model.architecture.name}"


def _hf_processor(folder: pathlib.Path) -> pathlib.Path | None:
    """The file of Hugging Face with the image processor's settings; of two the one that
    transformers takes."""
    nested, plain = folder / _PROCESSOR, folder / _PREPROCESSOR
    if nested.is_file() and "image_processor" in (settings := read_json(nested)):
        _warn_of_others(nested, settings["image_processor"], plain)
        return nested
    return plain if plain.is_file() else None


def _warn_of_others(used: pathlib.Path, settings: Any, other: pathlib.Path) -> None:
    """Names the settings in which the file that is not used differs."""
    if not (other.is_file() and isinstance(settings, Mapping)):
        return
    beside = read_json(other)
    differing = [key for key in settings if key in beside and beside[key] != settings[key]]
    if differing:
        _log.warning(
            "%s and %s differ in %s; as in transformers, the first is used.",
            used,
            other.name,
            ", ".join(differing),
        )
