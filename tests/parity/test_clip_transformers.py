"""CLIP both ways against `transformers` with random tiny weights: no download, mapping and maths
in one test."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import perception_jax
from perception_jax.api import Layout
from tests.arrays import run
from tests.parity.measures import Row

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def theirs(request):
    torch.manual_seed(0)
    vision = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 30,
        "patch_size": 7,
        "hidden_act": request.param,
    }
    text = {
        "vocab_size": 90,
        "hidden_size": 36,
        "intermediate_size": 60,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 12,
        "hidden_act": request.param,
        "bos_token_id": 88,
        "eos_token_id": 89,
        "pad_token_id": 89,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():  # fresh biases and norms are zeros and ones, which hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    pixels = rng.normal(size=(2, 30, 30, 3)).astype(np.float32)
    ids = rng.integers(0, 88, (3, 12)).astype(np.int32)
    ids[:, 0], ids[0, 5:], ids[1, 11], ids[2, 8:] = 88, 89, 89, 89
    return pixels, ids


def outputs_of(model, pixels, ids):
    with torch.no_grad():
        out = model(
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)),
            input_ids=torch.tensor(ids, dtype=torch.long),
        )
    return out.logits_per_image.numpy(), out.image_embeds.numpy(), out.text_embeds.numpy()


@pytest.mark.parametrize("layout", ["hf", "jax"])
def test_both_ways(theirs, inputs, tmp_path, layout: Layout):
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = perception_jax.load(tmp_path / "theirs")
    pixels, ids = inputs
    out = run(loaded.model, jnp.asarray(pixels), jnp.asarray(ids))
    logits, image, text = outputs_of(theirs, pixels, ids)
    act = theirs.config.vision_config.hidden_act
    through = ", through our own layout" if layout == "jax" else ""
    row = Row(f"tiny CLIP, {act}{through}", "Hugging Face", "transformers")
    row.read(loaded.report)
    row.close(out.image_embeds, image)
    row.close(out.text_embeds, text)
    row.close(out.logits_per_image, logits, 1e-4)

    perception_jax.export(loaded, tmp_path / "ours", layout=layout)
    if layout == "jax":  # one more hop: our own layout, then back to theirs
        loaded = perception_jax.load(tmp_path / "ours")
        perception_jax.export(loaded, tmp_path / "again", layout="hf")
        again = transformers.CLIPModel.from_pretrained(tmp_path / "again").eval()
    else:
        again = transformers.CLIPModel.from_pretrained(tmp_path / "ours").eval()
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    np.testing.assert_array_equal(outputs_of(again, pixels, ids)[0], logits)
    row.both_ways = True


def test_torch_bin_loads_through_the_restricted_reader(theirs, inputs, tmp_path):
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = perception_jax.load(tmp_path)
    pixels, ids = inputs
    out = run(loaded.model, jnp.asarray(pixels), jnp.asarray(ids))
    np.testing.assert_allclose(out.logits_per_image, outputs_of(theirs, pixels, ids)[0], atol=1e-4)
