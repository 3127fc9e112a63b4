"""Images per second of image towers, against transformers on torch where both are installed.

python tests/bench/encoders.py [--towers=ViT-B/16,ViT-L/14-336,DINOv2-L] [--batches=1,8] [--compile]

Random weights, float32 on CPU and bfloat16 on an accelerator, the same for both sides. The sides
take turns call by call, so that a busy machine slows both; the median call counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from perception_jax.models.clip.config import ClipConfig
from perception_jax.models.clip.modeling import VisionTower
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.dinov2.modeling import Dinov2

Call = Callable[[], object]
"""One forward pass, finished when it returns."""

CALLS = 7
CLIP_SIZES = {"ViT-B/16": ClipConfig.vit_b16, "ViT-L/14-336": ClipConfig.vit_l14_336}


@dataclasses.dataclass(frozen=True)
class Tower:
    """Attributes:
    size: pixels of a side.
    ours: builds the module.
    theirs: builds the `transformers` model.
    """

    size: int
    ours: Callable[[], nnx.Module]
    theirs: Callable[[], object]


def towers() -> Mapping[str, Tower]:
    """The measured ones, by name."""
    rngs = functools.partial(nnx.Rngs, params=0)
    found = {
        name: Tower(
            size=config().vision.image_size,
            ours=lambda config=config: VisionTower(
                config().vision, config().embed_dim, rngs=rngs()
            ),
            theirs=functools.partial(_transformers_clip, config),
        )
        for name, config in CLIP_SIZES.items()
    }
    found["DINOv2-L"] = Tower(
        size=224,
        ours=lambda: Dinov2(Dinov2Config.large(), rngs=rngs()),
        theirs=_transformers_dinov2,
    )
    return found


def _transformers_clip(config: Callable[[], ClipConfig]) -> object:
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


def _transformers_dinov2() -> object:
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


def our_call(tower: Tower, batch: int) -> Call:
    """Jitted, compiled and warm."""
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    model = jax.tree.map(lambda leaf: leaf.astype(dtype), tower.ours())
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(batch, tower.size, tower.size, 3)))
    forward = jax.jit(lambda model, pixels: model(pixels).pooled)
    return lambda: forward(model, pixels.astype(dtype)).block_until_ready()


def their_call(tower: Tower, batch: int, *, compiled: bool) -> Call:
    """Eager with SDPA, or through `torch.compile`."""
    import torch

    on_gpu = torch.cuda.is_available()
    kind = {"device": "cuda", "dtype": torch.bfloat16} if on_gpu else {"dtype": torch.float32}
    model = tower.theirs().eval().to(**kind)
    forward = torch.compile(model) if compiled else model
    pixels = torch.randn(batch, 3, tower.size, tower.size, **kind)

    def call() -> object:
        with torch.inference_mode():
            out = forward(pixel_values=pixels).last_hidden_state
        return out[:, 0].float().cpu() if on_gpu else out

    return call


def seconds_per_call(calls: Mapping[str, Call]) -> Mapping[str, float]:
    """Median seconds of each, taken in turns after two calls to warm up."""
    for call in (*calls.values(), *calls.values()):
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(CALLS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--towers", default=",".join(towers()))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--compile", action="store_true", help="measures torch.compile as well")
    given = parser.parse_args()
    against = [name for name in ("torch", "transformers") if importlib.util.find_spec(name)]
    print(f"{jax.devices()[0].device_kind}; images/s (relative to ours)")
    for name in given.towers.split(","):
        tower = towers()[name]
        for batch in map(int, given.batches.split(",")):
            calls = {"ours": our_call(tower, batch)}
            if len(against) == 2:
                calls["eager"] = their_call(tower, batch, compiled=False)
                if given.compile:
                    calls["compiled"] = their_call(tower, batch, compiled=True)
            taken = seconds_per_call(calls)
            rates = "  ".join(
                f"{side} {batch / one:7.2f} ({taken['ours'] / one:.2f})"
                for side, one in taken.items()
            )
            print(f"{name:13} batch {batch}  {rates}", flush=True)


if __name__ == "__main__":
    main()
