"""`load` a checkpoint from a folder, a file, the hub or the package, `export` one.

Four layouts are read and written:

- "hf": `config.json`, safetensors, `preprocessor_config.json`, tokenizer files; `transformers`
  loads the folder unchanged;
- "reference": the authors' names; open_clip loads the folder (`open_clip_config.json`), and for
  DINOv2, which has no settings, `load_state_dict` of the authors' model its one file;
- "timm": timm's names and `config.json`, for DINOv2 and for image towers alone;
- "jax": our own leaf paths (`vision/blocks/attention/q_proj/kernel`), with the settings of "hf" or
  of what else the architecture has.
"""

from perception_jax.api.adapters import find_adapters, image_metadata, load_backbone_of
from perception_jax.api.backbones import (
    PUBLISHED,
    backbone_processor,
    load_backbone,
    open_backbone,
    published_backbone,
)
from perception_jax.api.exporting import export, table_of
from perception_jax.api.language import (
    describe_language,
    drawn_language,
    language_config,
    without_weights,
)
from perception_jax.api.loaded import Loaded, Processor
from perception_jax.api.loading import describe, load, prepare
from perception_jax.api.locate import SHIPPED, find, shipped_folder
from perception_jax.api.lora import load_lora, save_lora
from perception_jax.api.multimodal import (
    add_image_token,
    assemble_llava,
    load_llava_lora,
    load_projectors,
    save_projectors,
)
from perception_jax.interop.checkpoint_source import Layout

__all__ = [
    "PUBLISHED",
    "SHIPPED",
    "Layout",
    "Loaded",
    "Processor",
    "add_image_token",
    "assemble_llava",
    "backbone_processor",
    "describe",
    "describe_language",
    "drawn_language",
    "export",
    "find",
    "find_adapters",
    "image_metadata",
    "language_config",
    "load",
    "load_backbone",
    "load_backbone_of",
    "load_llava_lora",
    "load_lora",
    "load_projectors",
    "open_backbone",
    "prepare",
    "published_backbone",
    "save_lora",
    "save_projectors",
    "shipped_folder",
    "table_of",
    "without_weights",
]
