"""LLaVA both ways against `transformers` with random tiny weights."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import perception_jax
from perception_jax.generate import IMAGE, Generator, Sampling
from tests.parity.measures import Row
from tests.parity.torch_code import assert_bit_equal, channels_first, randomised

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PLACEHOLDER, TOKENS = 90, 9
TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
}


def theirs_of(**settings):
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=PLACEHOLDER,
        image_seq_length=TOKENS,
        attn_implementation="eager",
        **settings,
    )
    return randomised(transformers.LlavaForConditionalGeneration(config), 0.05)


def inputs(tokens):
    """Two rows, the first with two images, the second with one and padding on the left."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 80, (2, 2 * tokens + 8))
    mask = np.ones(ids.shape, bool)
    for row, start in ((0, 2), (0, tokens + 5), (1, 6)):
        ids[row, start : start + tokens] = PLACEHOLDER
    mask[1, :4] = False
    images = rng.normal(size=(2, 2, 24, 24, 3)).astype(np.float32)
    return ids, mask, images


def outputs_of(theirs, ids, mask, images):
    pixels = channels_first(np.concatenate([images[0], images[1, :1]]))
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    with torch.no_grad():
        out = theirs(
            input_ids=torch.tensor(ids),
            pixel_values=pixels,
            attention_mask=torch.tensor(mask.astype(np.int64)),
            position_ids=torch.tensor(positions),
        )
    return out.logits.numpy()


def ours_of(ids):
    return np.where(ids == PLACEHOLDER, IMAGE, ids).astype(np.int32)


@pytest.mark.parametrize(
    ("name", "settings", "tokens"),
    [
        ("patch features of layer -2", {}, TOKENS),
        (
            "all features of the last layer",
            {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
            TOKENS + 1,
        ),
    ],
)
def test_both_ways(tmp_path, name, settings, tokens):
    theirs = theirs_of(**settings)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = perception_jax.load(tmp_path / "theirs")
    row = Row(f"tiny LLaVA, {name}", "llava-hf", "transformers")
    row.read(loaded.report)
    assert loaded.config.tokens_per_image == tokens
    ids, mask, images = inputs(tokens)
    expected = outputs_of(theirs, ids, mask, images)
    run = jax.jit(lambda model, ids, mask, images: model(ids, mask, images).logits)
    found = np.asarray(run(loaded.model, ours_of(ids), mask, images))
    row.close(found[mask], expected[mask], 1e-4)
    perception_jax.export(loaded, tmp_path / "ours")
    again = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    assert_bit_equal(theirs, again)
    np.testing.assert_array_equal(expected, outputs_of(again, ids, mask, images))
    for layout in ("reference", "jax"):
        perception_jax.export(loaded, tmp_path / layout, layout=layout)
        back = perception_jax.load(tmp_path / layout)
        assert back.config == loaded.config
        np.testing.assert_array_equal(run(back.model, ours_of(ids), mask, images), found)
    row.both_ways = True


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_both_spellings_of_llava_hf(tmp_path, spelling):
    """Names before and since transformers 4.52, whatever this version writes."""
    theirs = theirs_of()
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    named = {}
    for name, tensor in tensors.items():
        old = name.replace("model.language_model.", "language_model.model.", 1)
        old = old.removeprefix("model.") if not name.startswith("model.language") else old
        old = f"language_model.{old}" if old.startswith("lm_head") else old
        if "vision_tower.vision_model." not in old:
            old = old.replace("vision_tower.", "vision_tower.vision_model.", 1)
        new = old.replace("language_model.model.", "model.language_model.", 1)
        new = new.replace("language_model.lm_head", "lm_head")
        new = new if new.startswith(("model.", "lm_head")) else f"model.{new}"
        named[old if spelling == "old" else new] = tensor
    begins = ("language_model.", "vision_tower.", "multi_modal_projector.")
    assert all(name.startswith(begins) for name in named) == (spelling == "old")
    save_file(named, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = perception_jax.load(tmp_path)
    ids, mask, images = inputs(TOKENS)
    found = jax.jit(lambda m, *x: m(*x).logits)(loaded.model, ours_of(ids), mask, images)
    expected = outputs_of(theirs, ids, mask, images)
    np.testing.assert_allclose(np.asarray(found)[mask], expected[mask], atol=1e-4)


def test_greedy_texts_are_equal(tmp_path):
    theirs = theirs_of()
    theirs.save_pretrained(tmp_path)
    loaded = perception_jax.load(tmp_path)
    ids, _, images = inputs(TOKENS)
    rows, steps = [ids[0], ids[1, 4:]], 16
    tokens = jax.jit(lambda m, x: m.image_tokens(x))(loaded.model, images)
    prompts = [ours_of(row) for row in rows]
    found = Generator(loaded.model).generate(
        prompts, image_tokens=tokens, tokens=steps, sampling=Sampling(end_ids=(2,))
    )
    for row, own, pictures in zip(rows, found, (images[0], images[1, :1]), strict=True):
        with torch.no_grad():
            whole = theirs.generate(
                input_ids=torch.tensor(row)[None],
                attention_mask=torch.ones((1, len(row)), dtype=torch.long),
                pixel_values=channels_first(pictures),
                max_new_tokens=steps,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=2,
            )
        assert own.ids == tuple(whole[0, len(row) :].tolist())


def test_settings_that_are_not_supported_are_named(tmp_path):
    theirs = theirs_of()
    theirs.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"text_config": {"model_type": "qwen2"}}, "language model of the type 'llama'"),
        ({"vision_config": {"model_type": "pixtral"}}, "settings of an image tower"),
    ):
        with pytest.raises(perception_jax.errors.ConfigError, match=message):
            perception_jax.load(tmp_path, config=settings | change)
