"""GiVE in five lines: load, then encode images with or without instructions.

    encoder = GiveEncoder.from_pretrained("scenes-give")   # or a folder or file of adapters
    out = encoder.encode([image, image], ["the kite", "the dog"])
    out.embedding @ out.embedding.T          # the same image, looked at in two ways
    out.presence_logit > 0                   # is it there?

Letters: B batch, N image tokens, P patches, D image width, L blocks, E embedding width.
"""

from __future__ import annotations

import dataclasses
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
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.interop.adapters import backbone_of
from perception_jax.nn import stack
from perception_jax.nn.taps import Taps
from perception_jax.systems.give.adapter import Instruction
from perception_jax.systems.give.checkpoint import ADAPTERS_FILE, load_give, trained_on
from perception_jax.systems.give.encoding.encode import Encoder
from perception_jax.systems.give.model import Give, GiveConfig, GiveOutput, Steered

SHIPPED = ("scenes-give",)
"""Adapters in the package: `configs/give/scenes.py`, for "scenes-clip"."""
LLAVA_STRENGTH = 0.5
"""In front of a language model that was trained on features without instructions."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """Attributes:
    embedding: unit vectors in the joint space, float32.
    tokens: of the last block, before any final norm.
    hidden_states: input of the first block and output of each; None unless asked for.
    presence_logit: whether the named object is there (> 0: yes), float32; None without
      instructions.
    """

    embedding: Float[Array, "B E"]
    tokens: Float[Array, "B N D"]
    hidden_states: Float[Array, "_ B N D"] | None
    presence_logit: Float[Array, " B"] | None


class GiveEncoder:
    """A GiVE with its processor.

    Attributes:
      model: the network.
      backbone: name, configuration and processor of what it stands on.
    """

    def __init__(self, model: Give, backbone: api.Loaded):
        self.model = model
        self.backbone = backbone
        self.processor = backbone.processor
        self._encoder = Encoder(backbone.processor)
        self._call = jax.jit(_call, static_argnames=("steered", "layers"))

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
        path = None if give is None else find_adapters(give)
        if path is not None and not path.is_file():
            raise CheckpointError(
                f"{path}: no adapters there. Expected a file of them, a folder that holds "
                f"{ADAPTERS_FILE}, or shipped ones ({', '.join(SHIPPED)}); an encoder without "
                "adapters is given as `backbone`."
            )
        if backbone is None:
            backbone = backbone_of(path, shipped=api.SHIPPED, trusted=trusted)
        loaded = api.load_backbone(backbone, text=text, dtype=dtype, mesh=mesh)
        if path is None:
            rngs = nnx.Rngs(params=0)
            return cls(Give(config or GiveConfig(), loaded.model, rngs=rngs), loaded)
        loaded = trained_on(path, loaded)
        return cls(load_give(path, loaded, renames=renames, mesh=mesh), loaded)

    def instructions(self, texts: Sequence[str]) -> Instruction:
        """What to steer by; made once, it serves any number of images."""
        return self._encoder.instructions(self.model, texts)

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n E"]:
        """Unit embeddings of captions."""
        return self._encoder.texts(self.model, texts)

    def encode(
        self,
        images: Sequence[Image],
        instructions: Sequence[str] | Instruction | None = None,
        *,
        alpha: float = 1.0,
        hidden_states: bool = False,
    ) -> Encoded:
        """Encodes images, each steered by its instruction.

        Args:
          images: arrays, bytes or paths.
          instructions: one an image; None gives the untouched backbone.
          alpha: strength of the steering; 1 is as trained, 0 the untouched backbone (and the
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
        instructions: Sequence[str] | Instruction | None,
        *,
        layer: int = -2,
        alpha: float = LLAVA_STRENGTH,
    ) -> Float[Array, "B P D"]:
        """Patch tokens of a hidden state, as LLaVA's projector takes them.

        Args:
          layer: hidden state; -1 is the last block's output.
          alpha: below 1 by default, since the projector was trained on unsteered features.
        """
        out = self._run(self.processor.images(images), instructions, alpha, (layer,))
        return out.tower.hidden[0][:, out.tower.prefix :]

    def tower(self, instructions: Sequence[str] | Instruction, *, alpha: float = 1.0) -> Steered:
        """An image tower with these instructions in mind, one for each image of a batch; for
        `nn.maps` and for whatever takes an image tower."""
        return Steered(self.model, self._told(instructions, alpha))

    def _run(
        self,
        pixels: Float[Array, "B H W 3"],
        instructions: Sequence[str] | Instruction | None,
        alpha: float,
        layers: tuple[int, ...],
    ) -> GiveOutput:
        told = None if instructions is None else self._told(instructions, alpha)
        if told is not None and len(told.mask) != len(pixels):
            raise ConfigError(
                f"expected one instruction for each of {len(pixels)} images, found "
                f"{len(told.mask)}; repeat the image to look at it under several."
            )
        return self._call(self.model, pixels, told, steered=alpha != 0, layers=layers)

    def _told(self, instructions: Sequence[str] | Instruction, alpha: float) -> Instruction:
        if not isinstance(instructions, Instruction):
            instructions = self.instructions(instructions)
        told = dataclasses.replace(instructions, strength=jnp.float32(alpha))
        return jax.tree.map(jnp.asarray, told)


def find_adapters(give: str | os.PathLike[str]) -> pathlib.Path:
    """The file of adapters: a path, the folder that it is in, or a shipped name."""
    path = pathlib.Path(give)
    if not path.exists() and os.fspath(give) in SHIPPED:
        path = api.shipped_folder(os.fspath(give))
    return path / ADAPTERS_FILE if path.is_dir() else path


def _call(
    model: Give,
    pixels: Array,
    told: Instruction | None,
    *,
    steered: bool,
    layers: tuple[int, ...],
) -> GiveOutput:
    taps = Taps(hidden=layers)
    if told is None or steered:
        return model(pixels, told, taps=taps)
    out = model(pixels, taps=taps)  # bit-equal to the backbone: adapters are not called at all
    present = model.oid_head(out.tower.pooled, told.embedding)
    return dataclasses.replace(out, presence_logit=present)
