"""GiVE's network: a frozen two-tower encoder, AG-Adapters in its image tower, an OID head.

The modules and their purpose are the paper's (arXiv 2410.20109); placement, shapes and the head are
this library's resolution. Letters: B batch, H W image, T text tokens, N image tokens, D image
width, E embedding width, M rows (instructions of a batch of images), P patches.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from perception_jax import settings
from perception_jax.models import shardings as models
from perception_jax.models.paired import Backbone, is_joint
from perception_jax.models.params import flatten, with_inserts
from perception_jax.nn import stack
from perception_jax.nn.adapters import adapter_linear, placed
from perception_jax.nn.mlp import ACTIVATIONS
from perception_jax.nn.taps import Taps
from perception_jax.nn.text_tower import TextTower, text_mask
from perception_jax.nn.towers import TowerOutput
from perception_jax.ops.losses import unit
from perception_jax.systems.give.adapter import AdapterConfig, AgAdapter, InstructionFeatures

SHARDINGS = (
    (r"inserts/(fc1|to_[qkv])/kernel$", P(None, "fsdp", "tensor")),
    (r"inserts/(fc2|to_out)/kernel$", P(None, "tensor", "fsdp")),
    (r"inserts/.*$", P()),
    (r"^(oid_head|visual_proj|dense_head)/.*$", P()),
    *models.SHARDINGS,
)
"""Sharding rules; adapters are sharded as the blocks that they are in."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GiveConfig:
    """Settings of the network.

    Attributes:
      layers: blocks with an adapter, counted from 0, or a name: "spread" (twelve), "all", "first
        half", "last half"; see `nn.adapters.placed`.
      adapter: settings of all adapters.
      dense: whether there is a dense head: a logit for each patch that it shows the named object
        (the "plus" profile).
      head_act: activation of the OID head, one of `nn.mlp.ACTIVATIONS`.

    Raises:
      ConfigError: an unknown activation.
    """

    layers: tuple[int, ...] | str = "spread"
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    dense: bool = False
    head_act: str = "gelu"

    def __post_init__(self) -> None:
        settings.check(self.head_act, settings.Choice(tuple(ACTIVATIONS)), "head_act")

    def placed(self, depth: int) -> tuple[int, ...]:
        """The blocks with an adapter in a tower of `depth` blocks; see `nn.adapters.placed`."""
        return placed(self.layers, depth)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GiveOutput:
    """Outputs of `Give`.

    Attributes:
      tower: output of the image tower, conditioned if there was an instruction.
      embedding: unit vectors in the joint space of images and texts, float32.
      presence_logit: logit that the named object is in the image, float32; None without an
        instruction.
      place_logits: logits that each patch shows the named object, float32; None without an
        instruction or without the dense head.
    """

    tower: TowerOutput
    embedding: Float[Array, "M E"]
    presence_logit: Float[Array, " M"] | None
    place_logits: Float[Array, "M P"] | None


class OidHead(nnx.Module):
    """Object-presence head: an MLP from pooled image token and instruction embedding to a logit."""

    def __init__(self, width: int, embed_dim: int, *, act: str = "gelu", rngs: nnx.Rngs):
        self.act = act
        self.fc1 = adapter_linear(width + embed_dim, width, rngs=rngs)
        self.fc2 = adapter_linear(width, 1, rngs=rngs)

    def __call__(
        self, pooled: Float[Array, "M D"], instruction: Float[Array, "M E"]
    ) -> Float[Array, " M"]:
        """The presence logit, float32."""
        joined = jnp.concatenate([pooled, instruction.astype(pooled.dtype)], axis=1)
        return self.fc2(ACTIVATIONS[self.act](self.fc1(joined)))[:, 0].astype(jnp.float32)


class Give(nnx.Module):
    """A backbone with adapters in `backbone.vision.blocks`, and the OID head.

    Adapters, head and, for a tower without a joint space, `visual_proj` are `AdapterParam`s: they
    train, the backbone does not. Fresh adapters change nothing.
    """

    def __init__(self, config: GiveConfig, backbone: Backbone, *, rngs: nnx.Rngs):
        backbone = jax.tree.map(lambda leaf: leaf, backbone)  # the caller's is not changed
        vision = backbone.vision
        width = vision.norm_post.scale.shape[0]
        text_width, embed_dim = backbone.text.projection.kernel.shape
        layers = config.placed(stack.depth_of(vision.blocks))

        def adapter(rngs: nnx.Rngs) -> AgAdapter:
            return AgAdapter(config.adapter, width, text_width, rngs=rngs)

        adapters = stack.init(adapter, len(layers), rngs=rngs)
        vision.blocks = stack.Inserted(vision.blocks, adapters, layers)
        self.backbone = backbone
        self.oid_head = OidHead(width, embed_dim, act=config.head_act, rngs=rngs)
        self.visual_proj = None if is_joint(backbone) else _projection(width, embed_dim, rngs)
        # Zero at first: a probability of 0.5 for every patch.
        self.dense_head = adapter_linear(width, 1, zero=True, rngs=rngs) if config.dense else None

    def __call__(
        self,
        pixels: Float[Array, "B H W 3"],
        instruction: InstructionFeatures | None = None,
        *,
        repeats: int = 1,
        taps: Taps | None = None,
        depth: int | None = None,
        remat: stack.Remat = False,
    ) -> GiveOutput:
        """Encodes normalised pixels, each conditioned on its instruction.

        Args:
          instruction: `repeats` rows for each image, consecutive; None gives the unconditioned
            backbone.
          repeats: instructions an image; blocks before the first adapter run once an image.
          taps, depth, remat: as of the image tower.
        """
        context = None
        if instruction is not None:
            context = stack.Context(given=instruction, repeats=repeats)
        tower = self.backbone.vision(pixels, taps=taps, context=context, depth=depth, remat=remat)
        joint = tower.embedding if self.visual_proj is None else self.visual_proj(tower.pooled)
        present = places = None
        if instruction is not None:
            present = self.oid_head(tower.pooled, instruction.embedding)
            places = None if self.dense_head is None else self._places(tower)
        return GiveOutput(
            tower=tower, embedding=unit(joint), presence_logit=present, place_logits=places
        )

    def _places(self, tower: TowerOutput) -> Float[Array, "M P"]:
        vision = self.backbone.vision
        patches = tower.patches if vision.normed_tokens else vision.norm_post(tower.patches)
        return self.dense_head(patches)[..., 0].astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConditionedTower:
    """An image tower conditioned on an instruction, one row an image.

    It has the interface of an image tower: called with pixels, it takes taps and returns a
    `TowerOutput`, so that the functions of `nn.maps` apply to it.
    """

    give: Give
    instruction: InstructionFeatures

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self.give.backbone.vision.prefix

    def __call__(
        self,
        pixels: Float[Array, "B H W 3"],
        *,
        taps: Taps | None = None,
        depth: int | None = None,
        remat: stack.Remat = False,
    ) -> TowerOutput:
        """Runs the tower; `embedding` of the output is a unit vector in the joint space."""
        out = self.give(pixels, self.instruction, taps=taps, depth=depth, remat=remat)
        return dataclasses.replace(out.tower, embedding=out.embedding)


def path_in_give(path: str) -> str:
    """The path that a leaf of a backbone has in a `Give` around it."""
    return f"backbone/{with_inserts(path, 'vision/blocks')}"


def leaves_in_give(backbone: nnx.Module) -> dict[str, Array]:
    """A backbone's leaves by the paths that they have in a `Give`."""
    return {path_in_give(path): leaf for path, leaf in flatten(backbone).items()}


def instruct(
    tower: TextTower,
    ids: Int[Array, "B T"],
    *,
    dtype: np.typing.DTypeLike = jnp.float32,
    strength: float = 1.0,
    end_id: int | None = None,
) -> InstructionFeatures:
    """Computes instruction features by a frozen text tower: its tokens up to the first end token.

    Args:
      ids: SigLIP's padded to the context; others to any common length, with any padding.
      strength: factor on the adapters' output; 1 is as trained.
      end_id: the end token; None for the tower's own (see `text_mask`).
    """
    out = tower(ids, dtype=dtype)
    end_id = tower.end_id if end_id is None else end_id
    return InstructionFeatures(
        states=out.tokens,
        mask=text_mask(ids, tower.pool, end_id),
        embedding=unit(out.embedding),
        strength=jnp.float32(strength),
    )


def _projection(width: int, embed_dim: int, rngs: nnx.Rngs) -> Any:
    layer = adapter_linear(width, embed_dim, bias=False, rngs=rngs)
    normal = functools.partial(jax.random.normal, rngs.params())
    layer.kernel[...] = width**-0.5 * normal(layer.kernel.shape)
    return layer
