"""LLaVA put together from several checkpoints: a language model, image towers and projectors.

The authors publish a model in any of these ways: as a whole, as a projector for a language model
(`mm_projector.bin`, with a second image tower also `dino_mm_projector.bin`), or as LoRA for one,
with the trained projector in `non_lora_trainables.bin`. `perception_jax.load` reads whole ones.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from perception_jax.api.joined import FreshWeights, JoinedWeights, TableWeights
from perception_jax.api.loaded import LazyWeights, Loaded, Processor
from perception_jax.api.loading import prepare, prepare_tower
from perception_jax.api.locate import find
from perception_jax.api.lora import load_lora
from perception_jax.data.conversation import IMAGE_TEXT
from perception_jax.data.processors import ImageProcessor
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.interop import peft
from perception_jax.interop.checkpoint_dir import open_checkpoint, read_json
from perception_jax.interop.checkpoint_source import CONFIG
from perception_jax.interop.export import export_params
from perception_jax.interop.load import load_params
from perception_jax.interop.rules import identity_table
from perception_jax.interop.writer import write_checkpoint
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.llama.config import LlamaConfig
from perception_jax.models.llava.config import LlavaConfig, dinov2_l14, tower_vision
from perception_jax.models.llava.formats import VISION, from_reference
from perception_jax.models.llava.modeling import Llava, Projector
from perception_jax.models.llava.params import projector_table
from perception_jax.models.params import flatten, unflatten
from perception_jax.models.registry import architecture_of
from perception_jax.models.resized import resized_tower
from perception_jax.shard.mesh import mesh_of
from perception_jax.shard.rules import shardings

FIRST, SECOND, BESIDE_LORA = "mm_projector", "dino_mm_projector", "non_lora_trainables"
"""Names, without suffix, of files that hold projectors."""
_SUFFIXES = (".safetensors", ".bin")
_NAME = re.compile(r"(?:.*\.)?((?:dino_)?mm_projector\.[^.].*)")

_log = logging.getLogger(__name__)


def assemble_llava(
    language: str | os.PathLike[str],
    towers: Sequence[str | os.PathLike[str]],
    *,
    projectors: str | os.PathLike[str] | None = None,
    reference_adapter_collision: bool = False,
    seed: int = 0,
    image_size: int | None = None,
    **settings: Any,
) -> Loaded:
    """Opens a LLaVA made of other checkpoints, without reading weights.

    Args:
      language: a language model of the Llama family; its tokenizer becomes the model's.
      towers: one or two image towers, or models that have one. The second's positions are resized
        as in the authors' code where it is a DINOv2 without registers.
      projectors: a folder or file with trained ones, see `load_projectors`; None draws new ones.
      reference_adapter_collision: see `load_projectors`.
      seed: of new projectors.
      image_size: side of images, pixels; None is that of the first tower.
      **settings: fields of `LlavaConfig`; with two towers `mixing` is "interleaved" by default.

    Raises:
      CheckpointError, ConfigError: as `perception_jax.load` and `LlavaConfig`.
    """
    base = prepare(language)
    if not isinstance(base.config, LlamaConfig):
        raise ConfigError(
            f"{language}: expected a language model of the Llama family, found a "
            f"{type(base.model).__name__}."
        )
    opened = [tower_at(tower, image_size) for tower in towers]
    configs = [as_second_tower(one.config) if k else one.config for k, one in enumerate(opened)]
    mixed = {"mixing": "interleaved"} if len(opened) > 1 else {}
    config = LlavaConfig(language=base.config, towers=tuple(configs), **(mixed | settings))
    model = nnx.eval_shape(lambda: Llava(config, rngs=nnx.Rngs(params=0)))
    parts: dict[str, LazyWeights] = {"language/": base.weights}
    for prefix, tower in zip(("vision/", "second_vision/"), opened, strict=False):
        parts[prefix] = tower.weights
    if projectors is None:
        for name in _projectors(model):
            parts[f"{name}/"] = FreshWeights(init=_init(model, name, seed))
    else:
        files = projector_files(
            projectors, config, reference_adapter_collision=reference_adapter_collision
        )
        parts[""] = TableWeights(
            table=projector_table(config), files=files, leaves=_projector_leaves(model)
        )
    arch = architecture_of(config)
    image = ImageProcessor(**arch.image_settings(config, "reference"))
    return Loaded(
        name=os.fspath(language),
        model=model,
        config=config,
        processor=Processor(image=image, tokenizer=base.processor.tokenizer),
        weights=JoinedWeights(parts=parts, rules=arch.shardings),
    )


def tower_at(source: str | os.PathLike[str], size: int | None) -> Loaded:
    """Opens an image tower for images of a given size.

    Args:
      source: as of `prepare_tower`.
      size: pixels; of another size than the tower's own, its weights are read and its position
        embeddings are resized. None is its own.

    Raises:
      CheckpointError, ConfigError: as `prepare_tower`, or a size that is not whole patches.
    """
    opened = prepare_tower(source)
    own = tower_vision(opened.config)
    if size in (None, own.image_size):
        return opened
    if size < own.patch_size or size % own.patch_size:
        raise ConfigError(
            f"image_size: expected a multiple of {own.patch_size}, the patches of {source}, found "
            f"{size}."
        )
    read = opened.load_weights()
    model, config = resized_tower(read.model, read.config, size)
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(model).items()}
    shapes = _shapes(leaves)
    weights = TableWeights(
        table=identity_table(leaves), files=leaves, leaves=shapes, rules=opened.weights.rules
    )
    return dataclasses.replace(
        opened, model=unflatten(model, shapes), config=config, weights=weights
    )


def load_projectors(
    loaded: Loaded,
    source: str | os.PathLike[str],
    *,
    reference_adapter_collision: bool = False,
) -> Loaded:
    """Replaces the projectors of a LLaVA by those of a file.

    Args:
      loaded: with weights; its other leaves are shared with the result.
      source: `mm_projector.bin`, `dino_mm_projector.bin`, `non_lora_trainables.bin` (also as
        `.safetensors`), or a folder with some of them.
      reference_adapter_collision: reads `mm_projector.bin` as the released code of arXiv 2401.06209
        does. The stored names "mm_projector" and "dino_mm_projector" both contain the first, so
        that there both projectors start as the second one.

    Raises:
      CheckpointError: there are no projectors, or those of another model.
      ConfigError: no LLaVA, or one without weights.
    """
    _check_llava(loaded)
    files = projector_files(
        source, loaded.config, reference_adapter_collision=reference_adapter_collision
    )
    leaves = _projector_leaves(loaded.model)
    mesh = mesh_of(loaded.model)
    rules = architecture_of(loaded.config).shardings
    dtypes = {leaf.dtype for leaf in leaves.values()}
    read = load_params(
        projector_table(loaded.config),
        files,
        _shapes(leaves),
        dtype=next(iter(dtypes)),
        shardings=None if mesh is None else shardings(leaves, rules, mesh),
    )
    model = unflatten(loaded.model, {**flatten(loaded.model), **read.params})
    return dataclasses.replace(loaded, model=model)


def save_projectors(
    loaded: Loaded, folder: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Writes the projectors of a LLaVA under the authors' names, as `mm_projector.safetensors`.

    Args:
      loaded: with weights.
      folder: new or empty, unless `overwrite`.

    Raises:
      CheckpointError: the folder cannot be written.
      ConfigError: no LLaVA, or one without weights.
    """
    _check_llava(loaded)
    leaves = _projector_leaves(loaded.model)
    write_checkpoint(
        folder,
        export_params(projector_table(loaded.config), leaves),
        weights=f"{FIRST}.safetensors",
        max_shard_bytes=2**63,
        overwrite=overwrite,
    )


def add_image_token(loaded: Loaded, *, vocab_size: int = 32064) -> Loaded:
    """Returns a LLaVA of the authors with the vocabulary of llava-hf, so that it exports as "hf".

    The tokenizer gets `<image>` and `<pad>`; new rows of the embedding table and of the head are
    the mean of the others.

    Args:
      loaded: with weights, without an id for images.
      vocab_size: rows of the new vocabulary.

    Raises:
      ConfigError: no LLaVA, one without weights, one that has an id for images, or a vocabulary
        that is too small.
    """
    _check_llava(loaded)
    old = loaded.config.language
    if loaded.config.image_id is not None or vocab_size < old.vocab_size + 2:
        raise ConfigError(
            f"add_image_token: expected a LLaVA without an id for images and a vocabulary of at "
            f"least {old.vocab_size + 2} rows, found the id {loaded.config.image_id} and "
            f"{vocab_size} rows."
        )
    config = loaded.config.with_image_token(vocab_size)
    leaves = flatten(loaded.model)
    more = vocab_size - old.vocab_size
    for path, axis in (("language/token_embedding", 0), ("language/lm_head/kernel", 1)):
        if path in leaves:
            mean = jnp.mean(leaves[path], axis=axis, keepdims=True, dtype=jnp.float32)
            new = jnp.repeat(mean.astype(leaves[path].dtype), more, axis=axis)
            leaves[path] = jnp.concatenate([leaves[path], new], axis=axis)
    made = nnx.eval_shape(lambda: Llava(config, rngs=nnx.Rngs(params=0)))
    tokenizer = loaded.processor.tokenizer
    if tokenizer is not None:
        ids = {IMAGE_TEXT: config.image_id, "<pad>": config.language.pad_id}
        tokenizer = tokenizer.with_tokens(ids)
    image = dataclasses.replace(loaded.processor.image, mode="hf_crop", exif=True, alpha="white")
    return dataclasses.replace(
        loaded,
        model=unflatten(made, leaves),
        config=config,
        processor=Processor(image=image, tokenizer=tokenizer),
    )


def load_llava_lora(
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    tower: str | os.PathLike[str] | None = None,
    dtype: np.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Loaded:
    """Loads a folder of the authors with LoRA, its language model, image tower and projector.

    `nn.merge_lora` then merges the LoRA.

    Args:
      folder: or a hub id, with `config.json`, `adapter_config.json`, `adapter_model` and
        `non_lora_trainables.bin`.
      base: the language model; None is what `adapter_config.json` names.
      tower: the image tower; None is what `config.json` names.
      dtype, mesh: as of `perception_jax.load`.

    Raises:
      CheckpointError, ConfigError: as `assemble_llava`, `load_projectors` and `load_lora`.
    """
    path = find(folder)
    settings = read_json(path / CONFIG)
    base = base or peft.read_config(path).base
    tower = tower or settings.get("mm_vision_tower")
    if not base or not tower:
        raise CheckpointError(
            f"{path}: expected the names of a language model (adapter_config.json) and of an image "
            "tower (config.json: mm_vision_tower), found none. Give them as `base` and `tower`."
        )
    own = from_reference({VISION: {}, **settings} if VISION not in settings else settings)
    names = ("projector", "select_layer", "select_feature", "image_aspect", "image_marks")
    opened = assemble_llava(
        base, [tower], projectors=path, **{name: getattr(own, name) for name in names}
    )
    return load_lora(opened.load_weights(dtype=dtype, mesh=mesh), path, dtype=dtype)


def projector_files(
    source: str | os.PathLike[str],
    config: LlavaConfig,
    *,
    reference_adapter_collision: bool = False,
) -> Mapping[str, np.ndarray]:
    """The tensors of projectors under the authors' names, from one file or a folder of them.

    Args: as of `load_projectors`.

    Raises:
      CheckpointError: there are none.
    """
    path = pathlib.Path(source)
    paths = [path]
    if path.is_dir():
        paths = [
            path / (name + suffix)
            for name in (FIRST, SECOND, BESIDE_LORA)
            for suffix in _SUFFIXES
            if (path / (name + suffix)).is_file()
        ]
    found: dict[str, np.ndarray] = {}
    collided: dict[str, np.ndarray] = {}
    others: list[str] = []
    for file in paths:
        tensors = open_checkpoint(file)
        collides = reference_adapter_collision and file.stem == FIRST
        for name in tensors:
            match = _NAME.fullmatch(name)
            if match is None:
                others.append(name)
                continue
            found[f"model.{match[1]}"] = tensors[name]
            if collides and match[1].startswith(f"{SECOND}."):
                collided[f"model.{match[1].removeprefix('dino_')}"] = tensors[name]
    found |= collided
    if not found:
        raise CheckpointError(
            f"Expected projectors in {path}, in files such as {FIRST}.bin with names such as "
            f"model.{FIRST}.0.weight, found none."
        )
    if others:
        _log.warning(
            "%s: %d tensors that are no projector's, e.g. %s", path, len(others), others[0]
        )
    if config.mixing != "interleaved":
        return {name: x for name, x in found.items() if not name.startswith(f"model.{SECOND}.")}
    return found


def as_second_tower(config: Any) -> Any:
    """A DINOv2 as arXiv 2401.06209 runs it: with its authors' way of resizing positions."""
    if isinstance(config, Dinov2Config) and not config.registers:
        return dataclasses.replace(config, position_offset=dinov2_l14().position_offset)
    return config


def _projectors(model: Llava) -> tuple[str, ...]:
    names = ("projector", "second_projector")
    return tuple(name for name in names if getattr(model, name) is not None)


def _projector_leaves(model: Llava) -> dict[str, Any]:
    names = tuple(f"{name}/" for name in _projectors(model))
    found = ((path, leaf) for path, leaf in flatten(model).items() if path.startswith(names))
    return dict(found)


def _shapes(leaves: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    return {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in leaves.items()}


def _init(model: Llava, name: str, seed: int) -> Any:
    """A function that draws the leaves of a projector."""
    own = getattr(model, name)
    inputs, width = own.fc1.kernel.shape if own.depth else (1, 1)
    number = _projectors(model).index(name)

    def init() -> dict[str, jax.Array]:
        key = jax.random.fold_in(jax.random.key(seed), number)
        return flatten(Projector(own.depth, inputs, width, rngs=nnx.Rngs(params=key)))

    return init


def _check_llava(loaded: Any) -> None:
    if not isinstance(loaded, Loaded) or not isinstance(loaded.model, Llava):
        raise ConfigError("projectors: expected a LLaVA as `load` gives it, found another model.")
    if loaded.weights is not None:
        raise ConfigError("projectors: expected a model with weights; call its `load_weights()`.")
