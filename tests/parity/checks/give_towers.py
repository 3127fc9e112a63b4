"""Golden checks of whole steered towers: CLIP, SigLIP, and DINOv2 with a CLIP's text tower."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from perception_jax import api
from perception_jax.data.processors import ImageProcessor
from perception_jax.interop.load import load_params
from perception_jax.interop.safetensors_io import SafetensorsFile
from perception_jax.models.clip.config import ClipConfig
from perception_jax.models.clip.params import hf_table, text_table
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.paired import PairedConfig, build_backbone
from perception_jax.models.params import flatten, unflatten
from perception_jax.models.registry import architecture
from perception_jax.models.siglip.config import SiglipConfig
from perception_jax.nn.taps import Taps
from perception_jax.systems.give.checkpoint import load_give
from perception_jax.systems.give.model import GiveConfig, instruct
from tests.parity.cases import Case, assert_close, check
from tests.parity.checks.give import ACTIVATIONS, adapter_config


@check("give", when=lambda case: case.name.startswith("tiny_"))
def steered_tower(case: Case) -> None:
    settings, arrays = case.settings, case.arrays
    backbone = _backbone(case)
    act = settings["oid_head"]["activation"]
    stated = GiveConfig(
        adapter=adapter_config(settings["adapter"]), head_act=ACTIVATIONS.get(act, act)
    )
    give = load_give(case.directory / "give.safetensors", backbone, unstated=stated)
    assert give.backbone.vision.blocks.inserts.fc1.kernel.shape[2] == stated.adapter.mlp_hidden
    layers = give.backbone.vision.blocks.layers
    assert layers == tuple(settings["adapter"]["layers"])
    depth = settings["vision"]["num_hidden_layers"]
    pixels = jnp.asarray(arrays["pixel_values"].transpose(0, 2, 3, 1))
    every = Taps(hidden=tuple(range(depth + 1)))

    static = jax.jit(lambda give, pixels: give(pixels, taps=every))(give, pixels)
    _compare(case, "static", static, attention=False)
    plain = nnx.eval_shape(lambda: build_backbone(backbone.config, rngs=nnx.Rngs(params=0)))
    plain = unflatten(plain, flatten(backbone.model)).vision
    tokens = jax.jit(lambda tower, pixels: tower(pixels, taps=every).tokens)(plain, pixels)
    np.testing.assert_array_equal(static.tower.tokens, tokens)

    taps = dataclasses.replace(every, inserts=layers)
    steer = jax.jit(lambda give, pixels, told: give(pixels, told, taps=taps))
    # CLIP's tower has the end token from the same settings; SigLIP's does not use one.
    own = {"end_id": settings["text"]["eos_token_id"]} if give.backbone.text.pool == "last" else {}
    read = jax.jit(functools.partial(instruct, **own))
    for name in (key for key in arrays if key.startswith("input_ids")):
        ids = jnp.asarray(arrays[name], jnp.int32)
        told = read(give.backbone.text, ids)
        mask = np.asarray(told.mask)
        np.testing.assert_array_equal(mask, arrays["mask"][:, : mask.shape[1]], err_msg=name)
        states = np.where(mask[..., None], told.states, 0.0)
        assert_close(states, arrays["text_states"][:, : mask.shape[1]], what=f"{name} states")
        assert_close(told.embedding, arrays["text_embed"], what=f"{name} embedding")
        for k, strength in enumerate(settings["alphas"]):
            told = dataclasses.replace(told, strength=jnp.float32(strength))
            out = steer(give, pixels, told)
            _compare(case, f"alpha{k}", out, attention=strength != 0)


def _compare(case: Case, name: str, out: Any, *, attention: bool) -> None:
    settings, arrays = case.settings, case.arrays
    prefix, layer = settings["prefix_tokens"], settings["llava_layer"]
    assert out.tower.prefix == prefix
    found = {
        "hidden_states": out.tower.hidden,
        "tokens": out.tower.hidden[-1],
        "pooled": out.tower.pooled,
        "embed": out.embedding,
        "llava_features": out.tower.hidden[layer][:, prefix:],
    }
    if out.presence_logit is not None:
        found["presence_logit"] = out.presence_logit
    if attention:
        for block, rows in zip(settings["adapter"]["layers"], out.tower.inserts, strict=True):
            keys = rows.shape[-1]
            expected = arrays[f"{name}.attention.{block}"]
            assert_close(rows, expected[..., :keys], what=f"{name} attention of {block}")
    for key, value in found.items():
        assert_close(value, arrays[f"{name}.{key}"], what=f"{name} {key}")


def _backbone(case: Case) -> api.Loaded:
    settings = case.settings
    kind, text = settings["backbone"], settings["text"]
    hf = {
        "vision_config": settings["vision"],
        "text_config": text,
        "projection_dim": settings["projection_dim"],
    }
    files = SafetensorsFile(case.weights)
    if kind == "dinov2":
        vision = Dinov2Config.from_hf({"mlp_ratio": _ratio(settings), **settings["vision"]})
        clip = ClipConfig.from_hf({**hf, "vision_config": {}})
        config = PairedConfig(vision=vision, text=clip.text, embed_dim=clip.embed_dim)
        model = nnx.eval_shape(lambda: build_backbone(config, rngs=nnx.Rngs(params=0)))
        abstract = flatten(model)
        own = {p[7:]: leaf for p, leaf in abstract.items() if p.startswith("vision/")}
        table = architecture("dinov2").tables["hf"](vision)
        params = {f"vision/{p}": leaf for p, leaf in load_params(table, files, own).params.items()}
        rest = {p: leaf for p, leaf in abstract.items() if not p.startswith("vision/")}
        texts = SafetensorsFile(case.directory / "text_weights.safetensors")
        params |= load_params(text_table(), texts, rest).params
    else:
        config = (ClipConfig if kind == "clip" else SiglipConfig).from_hf(hf)
        model = nnx.eval_shape(lambda: build_backbone(config, rngs=nnx.Rngs(params=0)))
        table = hf_table() if kind == "clip" else architecture(kind).tables["hf"](config)
        params = load_params(table, files, flatten(model)).params
    return api.Loaded(
        name=case.name,
        model=unflatten(model, params),
        config=config,
        processor=api.Processor(
            image=ImageProcessor(size=settings["vision"]["image_size"]), tokenizer=None
        ),
    )


def _ratio(settings: Any) -> float:
    return settings["vision"]["intermediate_size"] / settings["vision"]["hidden_size"]
