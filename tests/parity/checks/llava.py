"""Golden checks of LLaVA and Mixture of Features: towers, projectors, splice, logits, gradients.

The cases' ids have one placeholder for an image; ours one for each of its tokens. The released code
makes the mask of a spliced row of the old one with new entries in front, which for padding on the
right, as here, is the mask of the spliced row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from perception_jax.data.processors import ImageProcessor
from perception_jax.generate import IMAGE
from perception_jax.interop.checkpoint_dir import open_checkpoint
from perception_jax.interop.export import export_params
from perception_jax.interop.load import load_params
from perception_jax.models.clip.config import VisionConfig
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.llama.config import LlamaConfig
from perception_jax.models.llava.architecture import ARCHITECTURES
from perception_jax.models.llava.config import LlavaConfig
from perception_jax.models.llava.modeling import Llava, added
from perception_jax.models.llava.params import projector_table, reference_table
from perception_jax.models.params import flatten, unflatten
from perception_jax.models.towers import TowerConfig
from perception_jax.ops.image import normalise
from perception_jax.ops.next_token import IGNORE, next_token_loss
from tests.parity.cases import Case, assert_close, check


def config_of(case: Case, mixing: str) -> LlavaConfig:
    """The model of a case, every size from its files."""
    given, clip, dino = case.settings, case.settings["clip"], case.settings["dinov2"]
    llama = dict(given["llama"])
    language = LlamaConfig.from_hf(llama | {"rope_theta": given["rope_theta"]})
    vision = VisionConfig(
        image_size=given["image_size"],
        patch_size=clip["patch_size"],
        width=clip["hidden_size"],
        depth=clip["num_hidden_layers"],
        heads=clip["num_attention_heads"],
        mlp_dim=clip["intermediate_size"],
        act=given["clip_hidden_act"],
        eps=given["clip_layer_norm_eps"],
    )
    second = Dinov2Config(
        image_size=dino["img_size"],
        patch_size=dino["patch_size"],
        width=dino["embed_dim"],
        depth=dino["depth"],
        heads=dino["num_heads"],
        mlp_dim=int(dino["embed_dim"] * given["dinov2_mlp_ratio"]),
        eps=given["dinov2_layer_norm_eps"],
        position_offset=given["dinov2_interpolate_offset"],
    )
    return LlavaConfig(
        language=language,
        towers=(TowerConfig(vision=vision), second),
        mixing=mixing,
        mixing_ratio=given.get("splice_alpha", 0.5),
        projector=given["args"]["projector"],
        select_layer=given["args"]["select_layer"],
        select_feature=given["args"]["select_feature"],
        image_aspect=given["image_aspect_ratio"],
    )


def load(case: Case, config: LlavaConfig) -> Llava:
    model = nnx.eval_shape(lambda: Llava(config, rngs=nnx.Rngs(params=0)))
    read = load_params(reference_table(config), open_checkpoint(case.weights), flatten(model))
    dropped = [name for name in open_checkpoint(case.weights) if "clip_vision_tower" in name]
    assert set(dropped) <= set(read.report.ignored)
    return unflatten(model, read.params)


def check_preprocessing(case: Case, config: LlavaConfig) -> None:
    processor = ImageProcessor(**ARCHITECTURES[0].image_settings(config, "reference"))
    raw = [case.arrays[name] for name in sorted(case.arrays) if name.startswith("raw_image_")]
    pixels = np.stack([processor(image).pixels for image in raw])
    values = np.asarray(normalise(jnp.asarray(pixels), processor.mean, processor.std))
    values = values.transpose(0, 3, 1, 2)
    expected = case.arrays["pixel_values"][: len(raw)]
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)


def rows_of(case: Case, tokens: int) -> tuple[np.ndarray, ...]:
    """Ids with a place for each token of an image, mask, labels, and the images of each row."""
    arrays = case.arrays
    ids, pixels = arrays["input_ids"], arrays["pixel_values"].transpose(0, 2, 3, 1)
    counts, times = (ids == IMAGE).sum(axis=1), np.where(ids == IMAGE, tokens, 1)
    labels = np.where(ids == IMAGE, IGNORE, arrays["labels"])
    shape = (len(ids), times.sum(axis=1).max())
    spread = [np.zeros(shape, np.int32), np.zeros(shape, bool), np.full(shape, IGNORE, np.int32)]
    images = np.zeros((len(ids), max(counts.max(), 1), *pixels.shape[1:]), np.float32)
    used = 0
    for k, count in enumerate(counts):
        for whole, part in zip(spread, (ids, arrays["attention_mask"], labels), strict=True):
            row = np.repeat(part[k], times[k])
            whole[k, : len(row)] = row
        images[k, :count] = pixels[used : used + count]
        used += max(count, 1)  # a text-only row has a dummy image
    return *spread, images


def compare_language(case: Case, model: Llava) -> None:
    """Splice, mask, logits and loss, and the gradients of the projectors where they are stored."""
    arrays = case.arrays
    ids, mask, label, images = rows_of(case, model.tokens_per_image)
    np.testing.assert_array_equal(mask, arrays["out_attention_mask"])
    np.testing.assert_array_equal(label, arrays["out_labels"])

    def losses(params: Mapping[str, Any]) -> tuple[Any, Any]:
        own = unflatten(model, {**flatten(model), **params})
        embeddings = own.embed(ids, own.image_tokens(images))
        out = own(ids, mask, images)
        loss = next_token_loss(out.tokens, own.logits, jnp.asarray(label)).mean()
        return loss, (embeddings, out.logits)

    names = ("projector/", "second_projector/")
    projectors = {p: leaf for p, leaf in flatten(model).items() if p.startswith(names)}
    run = jax.jit(jax.value_and_grad(losses, has_aux=True))
    (loss, (embeddings, logits)), gradients = run(projectors)
    # What is masked is padding that was embedded, or zeros behind it.
    assert_close(np.asarray(embeddings)[mask], arrays["inputs_embeds"][mask], what="inputs_embeds")
    assert_close(np.asarray(logits)[mask], arrays["logits"][mask], what="logits")
    assert_close(loss, arrays["loss"], what="loss")
    if stored := {name for name in arrays if name.startswith("grad.")}:
        found = {
            tensor.name.replace("model.", "grad.", 1): tensor.read()
            for tensor in export_params(projector_table(model.config), gradients)
        }
        assert found.keys() == stored
        for name, value in found.items():
            assert_close(value, arrays[name], what=name)


def compare_features(case: Case, model: Llava) -> tuple[Any, ...]:
    pixels = case.arrays["pixel_values"].transpose(0, 2, 3, 1)[:, None]
    features = jax.jit(lambda m, x: m.image_features(x))(model, pixels)
    names = ("clip_features", "dino_features")
    for name, found in zip(names, features, strict=True):
        assert_close(found[:, 0], case.arrays[name], what=name)
    return features


@check("mmvp_mof", when=lambda case: case.name.startswith("imof"))
def interleaved(case: Case) -> None:
    config = config_of(case, "interleaved")
    check_preprocessing(case, config)
    model = load(case, config)
    features = compare_features(case, model)
    tokens = jax.jit(lambda m, x: m.project(x))(model, features)[:, 0]
    assert_close(tokens[:, 0::2], case.arrays["clip_projected"], what="clip_projected")
    assert_close(tokens[:, 1::2], case.arrays["dino_projected"], what="dino_projected")
    compare_language(case, model)


@check("mmvp_mof", when=lambda case: case.name.startswith("amof"))
def additive(case: Case) -> None:
    config = config_of(case, "additive")
    assert config.mixing_ratio == case.arrays["alpha"]
    check_preprocessing(case, config)
    model = load(case, config)
    features = compare_features(case, model)
    for k, ssl in enumerate(case.arrays["ssl_ratio"]):
        ratio = 1 - float(ssl)
        mixed = added(ratio, *features)[:, 0]
        assert_close(mixed, case.arrays["mixed"][k], what=f"mixed, ratio {ratio}")
        own = with_config(model, dataclasses.replace(config, mixing_ratio=ratio))
        tokens = jax.jit(lambda m, x: m.project(x))(own, features)[:, 0]
        assert_close(tokens, case.arrays["projected"][k], what=f"projected, ratio {ratio}")
    compare_language(case, model)


def with_config(model: Llava, config: LlavaConfig) -> Llava:
    made = nnx.eval_shape(lambda: Llava(config, rngs=nnx.Rngs(params=0)))
    return unflatten(made, flatten(model))
