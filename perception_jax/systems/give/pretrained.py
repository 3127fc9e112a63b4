"""GiVE in five lines: load, then encode images with or without instructions.

    encoder = GiveEncoder.from_pretrained("scenes-give")   # or a folder or file of adapters
    out = encoder.encode([image, image], ["the kite", "the dog"])
    out.embedding @ out.embedding.T          # the same image under two instructions
    out.presence_logit > 0                   # is the object present?

Letters: B batch, N image tokens, P patches, D image width, L blocks, E embedding width.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from perception_jax import api
from perception_jax.api.backbones import TEXT_SOURCE
from perception_jax.data.records import Image
from perception_jax.errors import ConfigError
from perception_jax.files import write_whole
from perception_jax.interop.writer import replacing_folder
from perception_jax.models.paired import is_joint
from perception_jax.models.registry import architecture_of
from perception_jax.models.resized import resized
from perception_jax.nn import stack
from perception_jax.nn.taps import Taps
from perception_jax.systems.give.adapter import InstructionFeatures
from perception_jax.systems.give.checkpoint import (
    ADAPTERS_FILE,
    load_give,
    plain_backbone,
    save_give,
)
from perception_jax.systems.give.encode import ConditionedEncoder
from perception_jax.systems.give.model import ConditionedTower, Give, GiveConfig, GiveOutput

SHIPPED = ("scenes-give",)
"""Names of adapters in the package; `configs/give/scenes.py` trains them for "scenes-clip"."""
find_adapters = functools.partial(api.find_adapters, name=ADAPTERS_FILE, shipped=SHIPPED)
"""Path of a file of adapters, given as that path, its folder, or a shipped name."""
_README = "merged_folder.md"
LLAVA_STRENGTH = 0.5
"""Default strength before a language model that was trained on unconditioned features."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """Outputs of `GiveEncoder.encode`.

    Attributes:
      embedding: unit vectors in the joint space, float32.
      tokens: of the last block, before any final norm.
      hidden_states: input of the first block and output of each block; None unless asked for.
      presence_logit: logit that the named object is present, float32; None without instructions.
    """

    embedding: Float[Array, "B E"]
    tokens: Float[Array, "B N D"]
    hidden_states: Float[Array, "_ B N D"] | None
    presence_logit: Float[Array, " B"] | None


class GiveEncoder:
    """A loaded GiVE with its processor: encodes images with or without instructions.

    Attributes:
      model: the network.
      backbone: name, configuration and processor of the backbone.
    """

    def __init__(self, model: Give, backbone: api.Loaded):
        self.model = model
        self.backbone = backbone
        self.processor = backbone.processor
        self._encoder = ConditionedEncoder(backbone.processor)
        self._call = jax.jit(_call, static_argnames=("conditioned", "layers"))

    @classmethod
    def from_pretrained(
        cls,
        give: str | os.PathLike[str] | None = None,
        *,
        backbone: str | os.PathLike[str] | None = None,
        text: str | os.PathLike[str] = TEXT_SOURCE,
        config: GiveConfig | None = None,
        renames: Sequence[tuple[str, str]] = (),
        dtype: np.typing.DTypeLike | None = None,
        mesh: jax.sharding.Mesh | None = None,
        trusted: Sequence[str] = (),
    ) -> GiveEncoder:
        """Loads a backbone and the adapters for it.

        Args:
          give: adapters: a file (`checkpoint.save_give`), a folder that it lies in (of a
            training, or from `export.export_merged`), or a shipped name (`SHIPPED`); None makes
            fresh ones, which change nothing until they are trained.
          backbone: folder, hub id or shipped name; None takes the one in the adapters' folder, or
            else the one that their file names, if it is shipped, lies in that folder or is
            `trusted`.
          text: for a vision-only backbone, the CLIP whose text tower it gets.
          config: of fresh adapters.
          renames, mesh: see `checkpoint.load_give`.
          dtype: of the backbone; adapters keep theirs.
          trusted: backbones that a file may name besides: hub ids that may be fetched, and folders.

        Raises:
          ConfigError: neither `give` nor `backbone`.
          CheckpointError: files that are missing, damaged, or do not fit each other.
        """
        if give is None and backbone is None:
            raise ConfigError("name the backbone, the adapters, or both; found neither.")
        options = {"text": text, "dtype": dtype, "mesh": mesh}
        if give is None:
            loaded, rngs = api.load_backbone(backbone, **options), nnx.Rngs(params=0)
            return cls(Give(config or GiveConfig(), loaded.model, rngs=rngs), loaded)
        path = find_adapters(give)
        loaded = api.load_backbone_of(path, backbone, trusted=trusted, **options)
        return cls(load_give(path, loaded, renames=renames, mesh=mesh), loaded)

    def instructions(self, texts: Sequence[str]) -> InstructionFeatures:
        """Encodes instructions, for any number of images."""
        return self._encoder.instructions(self.model, texts)

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n E"]:
        """Unit embeddings of captions."""
        return self._encoder.texts(self.model, texts)

    def encode(
        self,
        images: Sequence[Image],
        instructions: Sequence[str] | InstructionFeatures | None = None,
        *,
        alpha: float = 1.0,
        hidden_states: bool = False,
    ) -> Encoded:
        """Encodes images, each conditioned on its instruction.

        Args:
          images: arrays, bytes or paths.
          instructions: one an image; None gives the untouched backbone.
          alpha: strength of the conditioning; 1 is as trained, 0 the untouched backbone (and the
            presence logit that follows from it).
          hidden_states: whether to keep those of every block.

        Raises:
          ConfigError: not one instruction an image.
          ImageError: an image cannot be decoded.
        """
        depth = stack.depth_of(self.model.backbone.vision.blocks)
        layers = tuple(range(depth + 1)) if hidden_states else (depth,)
        out = self._run(self.processor.images(images), instructions, alpha, layers)
        states = out.tower.hidden
        return Encoded(
            embedding=out.embedding,
            tokens=states[-1],
            hidden_states=states if hidden_states else None,
            presence_logit=out.presence_logit,
        )

    def llava_features(
        self,
        images: Sequence[Image],
        instructions: Sequence[str] | InstructionFeatures | None,
        *,
        layer: int = -2,
        alpha: float = LLAVA_STRENGTH,
    ) -> Float[Array, "B P D"]:
        """Patch tokens of a hidden state, as LLaVA's projector takes them.

        Args:
          layer: hidden state; -1 is the last block's output.
          alpha: below 1 by default, since the projector was trained on unconditioned features.
        """
        out = self._run(self.processor.images(images), instructions, alpha, (layer,))
        return out.tower.hidden[0][:, out.tower.prefix :]

    def tower(
        self, instructions: Sequence[str] | InstructionFeatures, *, alpha: float = 1.0
    ) -> ConditionedTower:
        """An image tower conditioned on these instructions, one for each image of a batch; for
        `nn.maps` and other functions of an image tower."""
        return ConditionedTower(self.model, self._features(instructions, alpha))

    def _run(
        self,
        pixels: Float[Array, "B H W 3"],
        instructions: Sequence[str] | InstructionFeatures | None,
        alpha: float,
        layers: tuple[int, ...],
    ) -> GiveOutput:
        features = None if instructions is None else self._features(instructions, alpha)
        if features is not None and len(features.mask) != len(pixels):
            raise ConfigError(
                f"expected one instruction for each of {len(pixels)} images, found "
                f"{len(features.mask)}; repeat the image to encode it under several."
            )
        return self._call(self.model, pixels, features, conditioned=alpha != 0, layers=layers)

    def _features(
        self, instructions: Sequence[str] | InstructionFeatures, alpha: float
    ) -> InstructionFeatures:
        if not isinstance(instructions, InstructionFeatures):
            instructions = self.instructions(instructions)
        features = dataclasses.replace(instructions, strength=jnp.float32(alpha))
        return jax.tree.map(jnp.asarray, features)


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
    if size != architecture_of(config).image_settings(config, "hf")["size"]:
        model, config = resized(model, config, size)
    loaded = api.Loaded(model=model, config=config, processor=encoder.processor)
    readme = importlib.resources.files("perception_jax.systems.give").joinpath(_README)
    with replacing_folder(pathlib.Path(directory).resolve(), overwrite=overwrite) as folder:
        api.export(loaded, folder)
        save_give(folder / ADAPTERS_FILE, encoder.model, encoder.backbone)
        write_whole(folder / "README.md", readme.read_text("utf-8"))


def _call(
    model: Give,
    pixels: Array,
    instruction: InstructionFeatures | None,
    *,
    conditioned: bool,
    layers: tuple[int, ...],
) -> GiveOutput:
    taps = Taps(hidden=layers)
    if instruction is None or conditioned:
        return model(pixels, instruction, taps=taps)
    out = model(pixels, taps=taps)  # bit-equal to the backbone: adapters are not called at all
    present = model.oid_head(out.tower.pooled, instruction.embedding)
    return dataclasses.replace(out, presence_logit=present)
