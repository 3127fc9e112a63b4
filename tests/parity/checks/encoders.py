"""Golden checks of the image-text encoders: open_clip and Hugging Face naming, every array that a
case stores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from perception_jax.interop.checkpoint_dir import open_checkpoint
from perception_jax.interop.load import load_params
from perception_jax.models.architecture import Architecture
from perception_jax.models.identify import open_clip_architecture
from perception_jax.models.params import flatten, unflatten
from perception_jax.models.registry import architecture
from perception_jax.nn.stack import depth_of
from perception_jax.nn.taps import Taps
from tests.parity.cases import Case, assert_close, check
from tests.parity.measures import Row


def _is_open_clip(case: Case) -> bool:
    return case.name.startswith("enc_") and case.settings.get("naming") == "open_clip"


def _is_hf(case: Case) -> bool:
    return case.settings.get("naming") == "hf" and case.settings.get("model_type") in (
        "clip",
        "siglip",
    )


def load(case: Case, arch: Architecture, config: Any, layout: str) -> nnx.Module:
    """The case's weights in our model, through the same table as any checkpoint."""
    model = nnx.eval_shape(lambda: arch.build(config, rngs=nnx.Rngs(params=0)))
    table = arch.tables[layout](config)
    loaded = load_params(table, open_checkpoint(case.weights), flatten(model))
    return unflatten(model, loaded.params)


@jax.jit
def run(model: Any, pixels: jax.Array, ids: jax.Array) -> tuple[Any, Any, Any]:
    """The model's output, and those of its towers with all hidden states."""

    def of(tower: Any, inputs: jax.Array) -> Any:
        return tower(inputs, taps=Taps(hidden=tuple(range(depth_of(tower.blocks) + 1))))

    return model(pixels, ids), of(model.vision, pixels), of(model.text, ids)


@check("mmvp_mof", when=_is_open_clip)
def open_clip(case: Case) -> None:
    settings = case.settings["open_clip"] | {"timm_overrides": case.settings["timm_overrides"]}
    arch = open_clip_architecture(settings)
    config = arch.read_config["reference"](settings)
    resolved = case.settings["resolved"]
    assert config.vision.mlp_dim == resolved["vision"]["mlp_hidden"]
    assert config.text.act == resolved["text"]["act"]
    if arch.name == "eva":
        assert config.vision.kind == resolved["vision"]["style"]
    else:
        assert config.vision.act == resolved["vision"]["act"]
    model, arrays = load(case, arch, config, "reference"), case.arrays
    pixels = jnp.asarray(arrays["image"].transpose(0, 2, 3, 1))
    ids = jnp.asarray(arrays["text"], jnp.int32)
    out, image, text = run(model, pixels, ids)
    first, last = jax.jit(lambda m, p, h: (m.patch_embed(p), m.norm_post(h)))(
        model.vision, pixels, image.hidden[-1]
    )

    found = {
        "vis.patch_embed": first,
        "vis.ln_pre": image.hidden[0],
        "vis.ln_post": last,
        "vis.final_norm": image.tokens,
        "vis.attn_pool": image.pooled,
        "txt.ln_final": text.tokens,
        "image_features": image.embedding,
        "text_features": text.embedding,
        "image_features_norm": out.image_embeds,
        "text_features_norm": out.text_embeds,
        "logits_per_image": out.logits_per_image,
        "logits_per_text": out.logits_per_image.T,
        "logit_scale_exp": np.exp(np.asarray(model.logit_scale[...])),
    }
    for prefix, tower in (("vis", image), ("txt", text)):
        for layer, state in enumerate(tower.hidden[1:]):
            found[f"{prefix}.block{layer}"] = state
    if "logit_bias" in arrays:
        found["logit_bias"] = model.logit_bias[...]
    if "rope_pos_embed" in arrays:  # (N, 2 H), sines then cosines, without the class token
        grid = model.vision.patch_embed.grid(pixels)
        rope = model.vision.rope(grid)
        found["rope_pos_embed"] = np.concatenate([rope.sin[1:], rope.cos[1:]], axis=1)
    compare(found, case, model, {"image", "text"}, names="open_clip")


@check("mmvp_mof", when=_is_hf)
def hugging_face(case: Case) -> None:
    arch = architecture(case.settings["model_type"])
    config = arch.read_config["hf"](
        {key: case.settings[key] for key in ("vision_config", "text_config")}
    )
    model, arrays = load(case, arch, config, "hf"), case.arrays
    pixels = jnp.asarray(arrays["pixel_values"].transpose(0, 2, 3, 1))
    ids = jnp.asarray(arrays["input_ids"], jnp.int32)
    out, image, text = run(model, pixels, ids)

    found = {
        "image_embeds": out.image_embeds,
        "text_embeds": out.text_embeds,
        "logits_per_image": out.logits_per_image,
        "logits_per_text": out.logits_per_image.T,
        "vision_last": image.tokens,
        "text_last": text.tokens,
        "vision_pooler": image.pooled,
        # SigLIP's pooler output is behind its head, CLIP's before its projection.
        "text_pooler": text.embedding if arch.name == "siglip" else text.pooled,
    }
    for prefix, tower in (("vision", image), ("text", text)):
        for layer, state in enumerate(tower.hidden):
            found[f"{prefix}_hidden{layer}"] = state
    compare(found, case, model, {"pixel_values", "input_ids"}, names="Hugging Face")


def compare(
    found: Mapping[str, Any], case: Case, model: nnx.Module, inputs: set[str], *, names: str
) -> None:
    """Every stored array must be among ours; what a case does not store is not compared."""
    arrays = case.arrays
    leaves = flatten(model).values()
    row = Row(
        f"golden {case.name}",
        names,
        "the authors' own code, stored",
        tensors=len(open_checkpoint(case.weights)),
        parameters=sum(leaf.size for leaf in leaves),
    )
    missing = set(arrays) - set(found) - inputs
    assert not missing, f"arrays of the case that are not compared: {sorted(missing)}"
    for name in sorted(set(arrays) - inputs):
        assert_close(found[name], arrays[name], what=name)
        row.close(found[name], arrays[name], tolerance=math.inf)
