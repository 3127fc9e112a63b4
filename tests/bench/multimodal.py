"""Tokens per second of a LLaVA with 576 or 1,152 image tokens, against transformers, on CPU.

python tests/bench/multimodal.py [--size=160m,1b] [--batches=1,8] [--images=1,2] [--tokens=16]
    [--rounds=3] [--compile] [--out=FILE.json]

float32, the same random weights on both sides: ours are exported as llava-hf's folder. The image
tower is a CLIP ViT-B/16 at 384 pixels, whose 24 × 24 patches are as many as LLaVA-1.5's; two images
stand for the 1,152 tokens of interleaved features, which transformers lacks. A prompt has 64 tokens
of text around its images. The sides take turns call by call and the median counts, as in
`generation.py`. "tower" is the time of the images alone, "prefill" what the first token takes on
top, "decode" what each further token takes.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from decoders import SIZES
from flax import nnx
from generation import Run, greedy, seconds

import perception_jax
from perception_jax.api import Loaded, Processor
from perception_jax.data.processors import ImageProcessor
from perception_jax.generate import IMAGE, Generator
from perception_jax.models.clip.config import VisionConfig
from perception_jax.models.llama.config import LlamaConfig
from perception_jax.models.llava.config import LlavaConfig
from perception_jax.models.llava.modeling import Llava
from perception_jax.models.params import flatten, unflatten
from perception_jax.models.towers import TowerConfig
from perception_jax.nn import stack

TOWER = TowerConfig(
    vision=VisionConfig(image_size=384, patch_size=16, width=768, depth=12, heads=12, mlp_dim=3072)
)
TEXT = 64
"""Tokens of text in a prompt, half of them before its images."""


def our_model(language: LlamaConfig) -> tuple[Llava, LlavaConfig]:
    """With small random leaves."""
    config = LlavaConfig(language=language, towers=(TOWER,)).with_image_token(
        language.vocab_size + 64
    )
    rng = np.random.default_rng(0)
    model = nnx.eval_shape(lambda: Llava(config, rngs=nnx.Rngs(params=0)))

    def leaf(path: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if path.endswith("scale"):
            return jnp.ones(shape.shape)
        return jax.device_put(0.02 * rng.standard_normal(shape.shape, np.float32))

    leaves = {path: leaf(path, shape) for path, shape in flatten(model).items()}
    return unflatten(model, leaves), config


def inputs(config: LlavaConfig, batch: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts with our id in the places of images, and normalised pixels, NHWC."""
    rng = np.random.default_rng(batch)
    texts = rng.integers(3, 32000, (batch, TEXT))
    places = np.full((batch, images * config.tokens_per_image), IMAGE)
    prompts = np.concatenate([texts[:, : TEXT // 2], places, texts[:, TEXT // 2 :]], axis=1)
    side = config.image_size
    return prompts, rng.standard_normal((batch, images, side, side, 3), np.float32)


def our_calls(model: Llava, prompts: np.ndarray, pixels: np.ndarray, tokens: int) -> dict[str, Any]:
    """Functions that encode the images, and that generate so many tokens."""
    length = prompts.shape[1]
    generator = Generator(model, buckets=(length, length + tokens), chunk=tokens)
    encode = jax.jit(lambda model, pixels: model.image_tokens(pixels))

    def run(count: int) -> np.ndarray:
        tokens_of_images = encode(model, pixels)
        state = generator.prefill(list(prompts), image_tokens=tokens_of_images, room=tokens).state
        parts = list(generator.stream(state, tokens=count))
        return np.concatenate([np.asarray(part.ids) for part in parts], axis=1)

    return {"tower": lambda: jax.block_until_ready(encode(model, pixels)), "run": run}


def their_calls(
    model: Any, cache: str | None, prompts: np.ndarray, pixels: np.ndarray, tokens: int
) -> dict[str, Any]:
    """The same of transformers; a compiled model gets a cache of fixed size."""
    del tokens
    ids = np.where(prompts == IMAGE, model.config.image_token_id, prompts)
    ids = torch.from_numpy(ids.astype(np.int64))
    flat = pixels.reshape(-1, *pixels.shape[2:]).transpose(0, 3, 1, 2)
    images = torch.from_numpy(np.ascontiguousarray(flat))

    def tower() -> Any:
        with torch.inference_mode():
            return model.get_image_features(pixel_values=images)

    given = {"pixel_values": images, "cache_implementation": cache}
    return {"tower": tower, "run": functools.partial(greedy, model, ids, **given)}


def sides(size: str, folder: pathlib.Path, *, compiled: bool) -> tuple[dict[str, Any], LlavaConfig]:
    """Each side's function from prompts, pixels and a number of tokens to its calls."""
    model, config = our_model(SIZES[size])
    processor = Processor(image=ImageProcessor(size=config.image_size), tokenizer=None)
    loaded = Loaded(model=model, config=config, processor=processor)
    perception_jax.export(loaded, folder, layout="hf")
    found: dict[str, Any] = {"ours": functools.partial(our_calls, stack.separate(model))}

    def theirs() -> Any:
        kind = transformers.LlavaForConditionalGeneration
        return kind.from_pretrained(folder, dtype=torch.float32).eval()

    found["eager"] = functools.partial(their_calls, theirs(), None)
    if compiled:
        other = theirs()
        other.forward = torch.compile(other.forward)
        found["compiled"] = functools.partial(their_calls, other, "static")
    return found, config


def measured(
    found: Mapping[str, Any], config: LlavaConfig, batch: int, images: int, given: Any
) -> dict[str, Any]:
    """The row of one batch and number of images."""
    prompts, pixels = inputs(config, batch, images)
    made = {name: make(prompts, pixels, given.tokens) for name, make in found.items()}
    ids = {name: calls["run"](given.tokens) for name, calls in made.items()}
    calls: dict[str, Callable[[], Any]] = {}
    for name, own in made.items():
        run: Run = own["run"]
        calls[f"{name} tower"] = own["tower"]
        calls[f"{name} first"] = functools.partial(run, 1)
        calls[f"{name} all"] = functools.partial(run, given.tokens)
    times = seconds(calls, given.rounds)
    row: dict[str, Any] = {"batch": batch, "image_tokens": images * config.tokens_per_image}
    for name in made:
        first, tower = times[f"{name} first"], times[f"{name} tower"]
        step = max(times[f"{name} all"] - first, 1e-9) / (given.tokens - 1)
        row[name] = {
            "tower_s": tower,
            "first_token_s": first,
            "prefill_tokens_per_s": prompts.size / max(first - tower, 1e-9),
            "decode_tokens_per_s": batch / step,
            "ids_as_ours": float(np.mean(ids[name] == ids["ours"])),
        }
    return row


def shown(size: str, row: Mapping[str, Any]) -> str:
    """The row as lines: each side, and how many times as fast ours is."""
    ours = row["ours"]
    lines = [f"{size}, batch {row['batch']}, {row['image_tokens']} image tokens"]
    for name, side in row.items():
        if not isinstance(side, dict):
            continue
        rates = ", ".join(
            f"{kind} {side[key]:8.1f} tokens/s ({ours[key] / side[key]:.2f}×)"
            for kind, key in (
                ("prefill", "prefill_tokens_per_s"),
                ("decode", "decode_tokens_per_s"),
            )
        )
        times = ", ".join(
            f"{kind} {side[key]:6.2f} s ({side[key] / ours[key]:.2f}×)"
            for kind, key in (("tower", "tower_s"), ("first token", "first_token_s"))
        )
        same = f"{100 * side['ids_as_ours']:.0f} % of the ids are ours"
        lines.append(f"  {name:9} {times}, {rates}, {same}")
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="160m", type=lambda text: text.split(","))
    parser.add_argument("--batches", default="1,8", type=lambda text: text.split(","))
    parser.add_argument("--images", default="1,2", type=lambda text: text.split(","))
    parser.add_argument("--tokens", default=16, type=int)
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    given = parser.parse_args()
    rows = []
    for size in given.size:
        with tempfile.TemporaryDirectory() as folder:
            found, config = sides(size, pathlib.Path(folder) / "hf", compiled=given.compile)
            for batch in map(int, given.batches):
                for images in map(int, given.images):
                    rows.append({"size": size, **measured(found, config, batch, images, given)})
                    print(shown(size, rows[-1]), flush=True)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
