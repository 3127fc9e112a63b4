"""The description of an architecture: how its checkpoints are recognised, read and written.

Each folder of `models` describes its own in `architecture.py`, as a tuple `ARCHITECTURES`: the
whole model, and the parts of it that can be loaded alone. `models.registry` lists the modules.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flax import nnx

from perception_jax.data.tokenization import LanguageTokenizer, PaddedTokenizer
from perception_jax.interop.rules import RuleTable, identity_table
from perception_jax.models.shardings import SHARDINGS

Settings = Mapping[str, Any]
"""Parsed JSON settings."""
Shapes = Mapping[str, tuple[int, ...]]
"""Tensor shapes by name."""
Tokenizer = LanguageTokenizer | PaddedTokenizer
"""A tokenizer of a language model or of a text tower."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """How settings without a `model_type` are recognised.

    Attributes:
      fits: whether parsed settings describe the architecture.
      expects: what such settings hold, for messages, e.g. "vit_base_patch14_dinov2".
    """

    fits: Callable[[Settings], bool]
    expects: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """Files next to the weights of a checkpoint.

    Attributes:
      folders: where files of a processor or tokenizer may be, in order of preference.
      settings: as parsed from JSON; empty without any.
      layout: whose names the tensors have.
    """

    folders: tuple[pathlib.Path, ...]
    settings: Settings
    layout: str

    def folder_with(self, *names: str) -> pathlib.Path | None:
        """The first folder that holds one of these files."""
        found = (f for f in self.folders if any((f / name).is_file() for name in names))
        return next(found, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """A part of a model whose weights are in another checkpoint.

    Attributes:
      path: where the paths of its leaves begin.
      source: the other checkpoint, as of `perception_jax.load`.
      key: of the settings under which those of the part are expected.
      settings: of the part in this model, instead of the other checkpoint's.
    """

    path: str
    source: str
    key: str
    settings: Settings = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture with its checkpoint layouts ("hf", "reference", "timm", "jax").

    Attributes:
      name: unique; stands as `model_type` in the settings of our own layout.
      build: makes the model from its configuration and `nnx.Rngs`.
      owns: whether a configuration object is one of this architecture's.
      read_config: by layout: a parsed JSON to our configuration. Without "jax" our own layout keeps
        the settings of "hf".
      write_config: by layout: our configuration to JSON, None where the layout has no settings.
      tables: by layout: configuration to name rules.
      model_types: other values of `model_type` in a `config.json` of Hugging Face.
      claims: by layout without a `model_type`: how its settings are recognised.
      read_names: for checkpoints without settings: layout and configuration that the names and
        shapes of the tensors tell; None if they are of another model.
      layout_of: settings with a `model_type` and shapes to the layout of the names, where several
        layouts have the same `model_type`; None if that is always "hf".
      elsewhere: settings and shapes to the parts that the checkpoint only names.
      complete: configuration, table and shapes to a configuration with what only the tensors tell,
        such as whether a projection was saved.
      parts: names of the architectures that are parts of this one.
      image_settings: configuration and layout to the fields of the `data.processors.ImageProcessor`
        that does what the authors' code does with images, where a checkpoint does not say; None for
        a model without images.
      read_tokenizer: files and configuration to the tokenizer, None if the checkpoint carries none
        that is read here; None for a model without texts.
      with_tokenizer: configuration and tokenizer to the configuration that is written next to the
        tokenizer's files; refuses one that does not fit.
      shardings: `(path regex, PartitionSpec)` rows for a mesh.
    """

    name: str
    build: Callable[..., nnx.Module]
    owns: Callable[[Any], bool]
    read_config: Mapping[str, Callable[[Settings], Any]]
    write_config: Mapping[str, Callable[[Any], dict[str, Any] | None]]
    tables: Mapping[str, Callable[[Any], RuleTable]]
    model_types: tuple[str, ...] = ()
    claims: Mapping[str, Claim] = dataclasses.field(default_factory=dict)
    read_names: Callable[[Shapes], tuple[str, Any] | None] | None = None
    layout_of: Callable[[Settings, Shapes], str] | None = None
    elsewhere: Callable[[Settings, Shapes], tuple[Elsewhere, ...]] | None = None
    complete: Callable[[Any, RuleTable, Shapes], Any] | None = None
    parts: tuple[str, ...] = ()
    image_settings: Callable[[Any, str], dict[str, Any]] | None = None
    read_tokenizer: Callable[[Files, Any], Tokenizer | None] | None = None
    with_tokenizer: Callable[[Any, Tokenizer], Any] | None = None
    shardings: tuple[tuple[str, Any], ...] = SHARDINGS

    def settings_layout(self, layout: str) -> str:
        """Returns the layout whose settings a layout uses: "jax" may use those of Hugging Face."""
        return "hf" if layout == "jax" and "jax" not in self.read_config else layout

    def table(self, layout: str, config: Any, paths: Iterable[str]) -> RuleTable:
        """Returns the name rules of a layout; "jax" stores every leaf under its path."""
        return identity_table(paths) if layout == "jax" else self.tables[layout](config)


def image_code(layout: str) -> dict[str, Any]:
    """How a layout's own code opens and crops images, as fields of an `ImageProcessor`.

    `transformers` applies EXIF's orientation and composites transparency on white; open_clip and
    OpenAI's `clip` do neither, and convert to RGB behind the crop, timm before.
    """
    if layout == "reference":
        return {"mode": "tv_crop", "exif": False, "alpha": "drop_resized"}
    if layout == "timm":
        return {"mode": "tv_crop", "exif": False, "alpha": "drop"}
    return {"mode": "hf_crop"}
