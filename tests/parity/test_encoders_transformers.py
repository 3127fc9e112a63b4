"""SigLIP and DINOv2 both ways against `transformers` with random tiny weights."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import perception_jax
from perception_jax.nn.taps import Taps
from tests.arrays import run
from tests.parity.measures import Row
from tests.parity.torch_code import assert_bit_equal, channels_first, randomised

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def test_siglip_both_ways(tmp_path):
    vision = {
        "hidden_size": 36,
        "intermediate_size": 70,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 30,
        "patch_size": 7,
    }
    text = {
        "vocab_size": 60,
        "hidden_size": 36,
        "intermediate_size": 70,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 9,
        "projection_size": 36,
    }
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    theirs = randomised(transformers.SiglipModel(config))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = perception_jax.load(tmp_path / "theirs")
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, 30, 30, 3)).astype(np.float32)
    ids = rng.integers(0, 60, (3, 9))
    out = run(loaded.model, jnp.asarray(pixels), jnp.asarray(ids, jnp.int32))
    with torch.no_grad():
        expected = theirs(pixel_values=channels_first(pixels), input_ids=torch.tensor(ids))
    row = Row("tiny SigLIP", "Hugging Face", "transformers")
    row.read(loaded.report)
    row.close(out.image_embeds, expected.image_embeds)
    row.close(out.text_embeds, expected.text_embeds)
    row.close(out.logits_per_image, expected.logits_per_image, 1e-4)
    perception_jax.export(loaded, tmp_path / "ours")
    assert_bit_equal(theirs, transformers.SiglipModel.from_pretrained(tmp_path / "ours"))
    row.both_ways = True


DINO = {
    "plain": (4, {}),
    "registers": (4, {"num_register_tokens": 3}),
    "swiglu": (4, {"use_swiglu_ffn": True}),
}


@pytest.mark.parametrize("kind", DINO)
def test_dinov2_both_ways_at_its_own_and_another_size(tmp_path, kind):
    ratio, settings = DINO[kind]
    name = "Dinov2WithRegisters" if kind == "registers" else "Dinov2"
    config = getattr(transformers, f"{name}Config")(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=35,
        patch_size=7,
        mlp_ratio=ratio,
        **settings,
    )
    model = getattr(transformers, f"{name}Model")
    theirs = randomised(model(config))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = perception_jax.load(tmp_path / "theirs")
    row = Row(f"tiny DINOv2, {kind}", "Hugging Face", "transformers, three image sizes")
    row.read(loaded.report)
    for height, width in ((35, 35), (56, 49), (21, 28)):
        rng = np.random.default_rng(height)
        pixels = rng.normal(size=(2, height, width, 3)).astype(np.float32)
        out = run(loaded.model, jnp.asarray(pixels), taps=Taps(hidden=(0, 1, 2, 3)))
        with torch.no_grad():
            expected = theirs(channels_first(pixels), output_hidden_states=True)
        row.close(out.tokens, expected.last_hidden_state)
        row.close(out.pooled, expected.pooler_output)
        for ours, state in zip(out.hidden, expected.hidden_states, strict=True):
            row.close(ours, state)
    perception_jax.export(loaded, tmp_path / "ours")
    assert_bit_equal(theirs, model.from_pretrained(tmp_path / "ours"))
    row.both_ways = True
