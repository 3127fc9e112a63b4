"""Golden checks of `models.clip`: open_clip and Hugging Face naming, every intermediate stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from perception_jax.interop.checkpoint_dir import open_checkpoint
from perception_jax.interop.load import load_params
from perception_jax.models.clip.config import ClipConfig
from perception_jax.models.clip.modeling import Clip
from perception_jax.models.clip.params import TABLES
from perception_jax.models.params import flatten, unflatten
from perception_jax.nn.taps import Taps
from tests.parity.cases import Case, assert_close, check


def _is_open_clip(case: Case) -> bool:
    vision = case.settings.get("resolved", {}).get("vision", {})
    return case.settings.get("naming") == "open_clip" and vision.get("style") == "openai"


def _is_hf(case: Case) -> bool:
    return case.settings.get("naming") == "hf" and case.settings.get("model_type") == "clip"


def load(case: Case, config: ClipConfig, layout: str) -> Clip:
    """The case's weights in our model, through the same table as any checkpoint."""
    model = nnx.eval_shape(lambda: Clip(config, rngs=nnx.Rngs(params=0)))
    loaded = load_params(TABLES[layout](), open_checkpoint(case.weights), flatten(model))
    return unflatten(model, loaded.params)


def all_states(depth: int) -> Taps:
    return Taps(hidden=tuple(range(depth + 1)))


@check("mmvp_mof", when=_is_open_clip)
def open_clip(case: Case) -> None:
    config = ClipConfig.from_open_clip(case.settings["open_clip"])
    resolved = case.settings["resolved"]
    assert config.vision.act == resolved["vision"]["act"]
    assert config.text.act == resolved["text"]["act"]
    assert config.vision.mlp_dim == resolved["vision"]["mlp_hidden"]
    model, arrays = load(case, config, "reference"), case.arrays
    pixels = jnp.asarray(arrays["image"].transpose(0, 2, 3, 1))
    ids = jnp.asarray(arrays["text"], jnp.int32)
    out = jax.jit(lambda m, p, i: m(p, i))(model, pixels, ids)
    image = model.vision(pixels, taps=all_states(config.vision.depth))
    text = model.text(ids, taps=all_states(config.text.depth))

    assert_close(image.hidden[0], arrays["vis.ln_pre"], what="vis.ln_pre")
    assert_close(model.vision.norm_post(image.tokens), arrays["vis.ln_post"], what="vis.ln_post")
    for tower, prefix, depth in ((image, "vis", config.vision.depth), (text, "txt", None)):
        depth = depth or config.text.depth
        for layer in range(depth):
            name = f"{prefix}.block{layer}"
            assert_close(tower.hidden[layer + 1], arrays[name], what=name)
    assert_close(text.tokens, arrays["txt.ln_final"], what="txt.ln_final")
    assert_close(image.embedding, arrays["image_features"], what="image_features")
    assert_close(text.embedding, arrays["text_features"], what="text_features")
    assert_close(out.image_embeds, arrays["image_features_norm"], what="image_features_norm")
    assert_close(out.text_embeds, arrays["text_features_norm"], what="text_features_norm")
    assert_close(out.logits_per_image, arrays["logits_per_image"], what="logits_per_image")
    assert_close(out.logits_per_image.T, arrays["logits_per_text"], what="logits_per_text")
    scale = np.exp(np.asarray(model.logit_scale[...]))
    assert_close(scale, arrays["logit_scale_exp"], what="logit_scale_exp")


@check("mmvp_mof", when=_is_hf)
def hugging_face(case: Case) -> None:
    config = ClipConfig.from_hf(
        {key: case.settings[key] for key in ("vision_config", "text_config")}
    )
    model, arrays = load(case, config, "hf"), case.arrays
    pixels = jnp.asarray(arrays["pixel_values"].transpose(0, 2, 3, 1))
    ids = jnp.asarray(arrays["input_ids"], jnp.int32)
    out = jax.jit(lambda m, p, i: m(p, i))(model, pixels, ids)
    image = model.vision(pixels, taps=all_states(config.vision.depth))
    text = model.text(ids, taps=all_states(config.text.depth))

    for tower, prefix in ((image, "vision"), (text, "text")):
        for layer, state in enumerate(tower.hidden):
            name = f"{prefix}_hidden{layer}"
            if name in arrays:  # the text tower's last one is stored after the final norm
                assert_close(state, arrays[name], what=name)
        assert_close(tower.tokens, arrays[f"{prefix}_last"], what=f"{prefix}_last")
        assert_close(tower.pooled, arrays[f"{prefix}_pooler"], what=f"{prefix}_pooler")
    assert_close(out.image_embeds, arrays["image_embeds"], what="image_embeds")
    assert_close(out.text_embeds, arrays["text_embeds"], what="text_embeds")
    assert_close(out.logits_per_image, arrays["logits_per_image"], what="logits_per_image")
    assert_close(out.logits_per_image.T, arrays["logits_per_text"], what="logits_per_text")
