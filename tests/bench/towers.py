"""The image towers that are measured: ours, and those of `transformers` on torch.

Random weights, float32 on CPU and bfloat16 on a GPU, the same for both sides.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measuring import Call

from perception_jax.models.clip.config import ClipConfig
from perception_jax.models.clip.modeling import ClipVisionTower
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.dinov2.modeling import Dinov2
from perception_jax.shard.flops import count_flops

_CLIP_SIZES = {"ViT-B/16": ClipConfig.vit_b16, "ViT-L/14-336": ClipConfig.vit_l14_336}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """Attributes:
    size: pixels of a side.
    ours: builds the module.
    theirs: builds the `transformers` model.
    """

    size: int
    ours: Callable[[], nnx.Module]
    theirs: Callable[[], Any]


def towers() -> Mapping[str, Tower]:
    """The measured ones, by name."""
    found = {
        name: Tower(
            size=config().vision.image_size,
            ours=functools.partial(_our_clip, config),
            theirs=functools.partial(_transformers_clip, config),
        )
        for name, config in _CLIP_SIZES.items()
    }
    found["DINOv2-L"] = Tower(size=224, ours=_our_dinov2, theirs=_transformers_dinov2)
    return found


def our_dtype() -> jnp.dtype:
    """What both sides compute in."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def our_model(tower: Tower) -> nnx.Module:
    """The module with small random leaves, on the device; nothing is compiled for it."""
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = 0.02 * rng.standard_normal(leaf.shape, np.float32)
        return jax.device_put(values.astype(our_dtype()))

    return jax.tree.map(fill, nnx.eval_shape(tower.ours))


def our_call(tower: Tower, model: nnx.Module, batch: int) -> Call:
    """Jitted; the first call compiles."""
    shape = (batch, tower.size, tower.size, 3)
    pixels = np.random.default_rng(0).standard_normal(shape, np.float32)
    pixels = jax.device_put(pixels.astype(our_dtype()))
    forward = jax.jit(lambda model, pixels: model(pixels).embedding)
    return lambda: forward(model, pixels)


def forward_flops(tower: Tower, model: nnx.Module, batch: int) -> int:
    """Of the matrix products of one forward pass."""
    pixels = jax.ShapeDtypeStruct((batch, tower.size, tower.size, 3), our_dtype())
    return count_flops(lambda model, pixels: model(pixels).embedding, model, pixels)


def their_model(tower: Tower) -> Any:
    """The `transformers` model with its own random weights, on the GPU if there is one."""
    return tower.theirs().eval().to(**_torch_kind())


def their_call(tower: Tower, model: Any, batch: int, *, compiled: str | None = None) -> Call:
    """Eager with SDPA, or through `torch.compile` in the mode `compiled`."""
    import torch

    forward = model
    if compiled is not None:
        forward = torch.compile(model, mode=compiled, dynamic=False)
    pixels = torch.randn(batch, 3, tower.size, tower.size).to(**_torch_kind())

    def call() -> Any:
        with torch.inference_mode():
            return forward(pixel_values=pixels).last_hidden_state

    return call


def _torch_kind() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        return {"device": "cuda", "dtype": torch.bfloat16}
    return {"dtype": torch.float32}


def _our_clip(config: Callable[[], ClipConfig]) -> nnx.Module:
    return ClipVisionTower(config().vision, config().embed_dim, rngs=nnx.Rngs(params=0))


def _our_dinov2() -> nnx.Module:
    return Dinov2(Dinov2Config.large(), rngs=nnx.Rngs(params=0))


def _transformers_clip(config: Callable[[], ClipConfig]) -> Any:
    import transformers

    vision = config().vision
    settings = transformers.CLIPVisionConfig(
        hidden_size=vision.width,
        intermediate_size=vision.mlp_dim,
        num_hidden_layers=vision.depth,
        num_attention_heads=vision.heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        projection_dim=config().embed_dim,
        attn_implementation="sdpa",
    )
    return transformers.CLIPVisionModelWithProjection(settings)


def _transformers_dinov2() -> Any:
    import transformers

    settings = transformers.Dinov2Config(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=518,
        patch_size=14,
        attn_implementation="sdpa",
    )
    return transformers.Dinov2Model(settings)
