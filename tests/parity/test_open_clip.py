"""Whole models both ways against open_clip's own code, with random tiny weights.

open_clip's settings take the sizes of a timm trunk from its name alone, so for these tests a few
names stand for tiny trunks, in timm and in our tables alike. The folders are then whole ones:
open_clip loads what we export by `local-dir:`.
"""

from __future__ import annotations

import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import perception_jax
from perception_jax import api
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.tokenization import AddedToken, ClipTokenizer
from perception_jax.models.clip.config import ClipConfig
from perception_jax.models.clip.modeling import Clip
from perception_jax.models.eva import config as eva
from perception_jax.models.siglip import config as siglip
from perception_jax.models.timm import Size
from tests.arrays import drawn, run
from tests.parity.measures import Row
from tests.parity.torch_code import assert_bit_equal, channels_first, open_clip, randomised

torch = pytest.importorskip("torch")

SIDE = 28
TRUNK = {"img_size": SIDE, "patch_size": 7, "embed_dim": 48, "depth": 2, "num_heads": 3}
TEXT = {"context_length": 9, "vocab_size": 60, "width": 36, "heads": 3, "layers": 2}
PLAIN = {"image_size": SIDE, "patch_size": 7, "width": 48, "layers": 2, "head_width": 16}
SIGLIP_TEXT = {
    **TEXT,
    "mlp_ratio": 3.7362,
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
}


def timm_trunk(name: str, pool: str, proj: str | None) -> dict:
    names = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj}
    return {"image_size": SIDE, "timm_model_pretrained": False, **names}


def eva_model(name: str) -> dict:
    vision = timm_trunk(name, "token", None)
    return {"embed_dim": 20, "vision_cfg": vision, "text_cfg": TEXT, "custom_text": True}


MODELS = {
    "CLIP quick_gelu": {"embed_dim": 20, "quick_gelu": True, "vision_cfg": PLAIN, "text_cfg": TEXT},
    "CLIP gelu": {
        "embed_dim": 20,
        "quick_gelu": False,
        "vision_cfg": PLAIN | {"mlp_ratio": 4.3637, "norm_kwargs": {"eps": 1e-4}},
        "text_cfg": TEXT | {"norm_kwargs": {"eps": 1e-3}},
    },
    "CLIP custom_text": {
        "embed_dim": 20,
        "quick_gelu": True,
        "custom_text": True,
        "vision_cfg": PLAIN,
        "text_cfg": TEXT,
    },
    "EVA01": eva_model("eva_giant_patch14_224"),
    "EVA02 rope": eva_model("eva02_large_patch14_clip_336"),
    "EVA02 post_norm": eva_model("eva02_enormous_patch14_clip_224"),
    "SigLIP": {
        "embed_dim": 48,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": timm_trunk("vit_base_patch16_siglip_224", "map", "none"),
        "text_cfg": SIGLIP_TEXT | {"act_kwargs": {"approximate": "tanh"}},
    },
}


@pytest.fixture
def tiny_trunks(monkeypatch):
    """Makes the trunks that `MODELS` name tiny ones, on both sides."""
    timm_model = open_clip().timm_model
    create = timm_model.timm.create_model
    tiny = functools.partial(create, **TRUNK)
    monkeypatch.setattr(timm_model.timm, "create_model", tiny)
    size = Size(SIDE, 7, 48, 2, 3)
    for name, (kind, named) in list(eva._TRUNKS.items()):
        changed = Size(SIDE, 7, 48, 2, 3, named.mlp_ratio)
        monkeypatch.setitem(eva._TRUNKS, name, (kind, changed))
    monkeypatch.setattr(siglip, "_named", lambda architecture: size)


def save(model, settings, folder, *, binary: bool) -> None:
    """As `open_clip.push_to_hf_hub.save_for_hf` does, but for the tokenizer."""
    import safetensors.torch

    folder.mkdir()
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"}
    text = json.dumps({"model_cfg": settings, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(text)
    if binary:
        torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    else:
        safetensors.torch.save_file(model.state_dict(), folder / "open_clip_model.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_both_ways(tmp_path, tiny_trunks, name):
    code, settings = open_clip(), MODELS[name]
    kind = code.CustomTextCLIP if settings.get("custom_text") else code.CLIP
    plain = {key: value for key, value in settings.items() if key != "custom_text"}
    theirs = randomised(kind(**plain))
    save(theirs, settings, tmp_path / "theirs", binary=name in ("CLIP gelu", "EVA01"))

    loaded = perception_jax.load(tmp_path / "theirs")
    assert loaded.processor.image.mode == "squash"
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)
    ids = rng.integers(0, 59, (3, 9))
    ids[:, 6] = 59  # the end token
    out = run(loaded.model, jnp.asarray(pixels), jnp.asarray(ids, jnp.int32))
    with torch.no_grad():
        image = theirs.encode_image(channels_first(pixels), normalize=True)
        text = theirs.encode_text(torch.tensor(ids), normalize=True)
        logits = theirs.get_logits(channels_first(pixels), torch.tensor(ids))[0]
    row = Row(f"tiny {name}", "open_clip", "open_clip")
    row.read(loaded.report)
    row.close(out.image_embeds, image)
    row.close(out.text_embeds, text)
    row.close(out.logits_per_image, logits, 1e-4)

    perception_jax.export(loaded, tmp_path / "ours", layout="reference")
    again = code.create_model(f"local-dir:{tmp_path / 'ours'}").eval()
    assert again.visual.preprocess_cfg["resize_mode"] == "squash"
    if name == "CLIP custom_text":  # written as the plain model, under shorter names
        weights = code.model.convert_to_custom_text_state_dict(again.state_dict())
        again = kind(**plain).eval()
        again.load_state_dict(weights)
    assert_bit_equal(theirs, again)
    with torch.no_grad():
        assert torch.equal(image, again.encode_image(channels_first(pixels), normalize=True))
    row.both_ways = True


def test_a_token_behind_the_end_token(tmp_path, tiny_trunks):
    """open_clip reads the exported tower at the end token, and the tokenizer from the folder."""
    text = TEXT | {"vocab_size": 601, "pool_type": "eos", "eos_id": 599}
    config = ClipConfig.from_open_clip(MODELS["CLIP gelu"] | {"text_cfg": text})
    tokenizer = ClipTokenizer.shipped(600, 9)
    tokenizer = dataclasses.replace(tokenizer, added=(AddedToken("<cat-toy>", 600),))
    ours = api.Loaded(
        model=drawn(lambda: Clip(config, rngs=nnx.Rngs(params=0))),
        config=config,
        processor=api.Processor(image=ImageProcessor(size=SIDE), tokenizer=tokenizer),
    )
    perception_jax.export(ours, tmp_path / "a", layout="reference")
    code = open_clip()
    theirs = code.create_model(f"local-dir:{tmp_path / 'a'}").eval()
    texts = ["the <cat-toy> is in", "a <cat-toy>", "in the"]
    ids = code.get_tokenizer(f"local-dir:{tmp_path / 'a'}")(texts)
    np.testing.assert_array_equal(ids.numpy(), ours.processor.texts(texts))
    with torch.no_grad():
        expected = theirs.encode_text(ids).numpy()
    found = run(ours.model.text, ours.processor.texts(texts)).embedding
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
