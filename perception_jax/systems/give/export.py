"""A backbone and its adapters as one folder, for `GiveEncoder.from_pretrained` and for PyTorch.

The backbone is a Hugging Face folder as `perception_jax.export` writes it, made for images of the
size on which the adapters trained; the adapters lie beside it, and a README has the reader for
PyTorch.
"""

from __future__ import annotations

import importlib.resources
import os
import pathlib

from perception_jax import api
from perception_jax.errors import ConfigError
from perception_jax.files import write_whole
from perception_jax.interop.writer import replacing_folder
from perception_jax.models.paired import is_joint
from perception_jax.models.registry import architecture_of
from perception_jax.models.resized import resized
from perception_jax.systems.give.checkpoint import ADAPTERS_FILE, plain_backbone, save_give
from perception_jax.systems.give.pretrained import GiveEncoder

README = "merged_folder.md"


def export_merged(
    directory: str | os.PathLike[str], encoder: GiveEncoder, *, overwrite: bool = False
) -> None:
    """Writes the folder, whole or not at all.

    Args:
      directory: new or empty, unless `overwrite`.

    Raises:
      CheckpointError: the folder is not empty or cannot be written.
      ConfigError: the backbone is a pair of two checkpoints, or has no Hugging Face layout.
    """
    if not is_joint(encoder.model.backbone):
        raise ConfigError(
            "this GiVE stands on two checkpoints, an image tower and another model's text tower, "
            "and a Hugging Face folder holds one: keep the adapters' own file "
            "(systems.give.checkpoint.save_give) and name both when you load it."
        )
    model, config = plain_backbone(encoder.model.backbone), encoder.backbone.config
    size = encoder.processor.image.size
    if size != architecture_of(config).image_processor(config, "hf").size:
        model, config = resized(model, config, size)
    loaded = api.Loaded(model=model, config=config, processor=encoder.processor)
    readme = importlib.resources.files("perception_jax.systems.give").joinpath(README)
    with replacing_folder(pathlib.Path(directory).resolve(), overwrite=overwrite) as folder:
        api.export(loaded, folder)
        save_give(folder / ADAPTERS_FILE, encoder.model, encoder.backbone)
        write_whole(folder / "README.md", readme.read_text("utf-8"))
