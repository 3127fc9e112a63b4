"""Where a text tower is read, ids it refuses, and the special ids of settings both ways."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perception_jax.errors import ConfigError
from perception_jax.models.clip.config import ClipConfig, VisionConfig
from perception_jax.models.siglip.config import SiglipConfig
from perception_jax.nn.text_tower import TextConfig, TextTower, text_mask

START, END, ADDED = 17, 18, 19  # 20 ids, one behind the end token
TEXT = TextConfig(
    vocab_size=20, context=6, width=8, depth=1, heads=2, mlp_dim=8, end_id=END, start_id=START
)
ROWS = np.array([[START, 3, ADDED, END, END, END], [START, END, ADDED, END, 0, 0]], np.int32)
CLIP = ClipConfig(
    vision=VisionConfig(image_size=8, patch_size=4, width=8, depth=1, heads=2, mlp_dim=8),
    text=TEXT,
    embed_dim=4,
)


def tower(**changes) -> TextTower:
    config = dataclasses.replace(TEXT, **changes)
    return jax.jit(lambda: TextTower(config, 4, rngs=nnx.Rngs(params=0)))()


@pytest.mark.parametrize(("end", "positions"), [(END, [3, 1]), (None, [2, 2])])
def test_read_at_the_first_end_token_or_the_largest_id(end, positions):
    """Compiled and not; the added token has the largest id."""
    model = tower(end_id=end)
    for out in (model(ROWS), jax.jit(lambda ids: model(ids))(ROWS)):
        np.testing.assert_array_equal(out.pooled, np.asarray(out.tokens)[np.arange(2), positions])
    mask = text_mask(jnp.asarray(ROWS), model.pool, model.end_id)
    assert mask.sum(1).tolist() == [position + 1 for position in positions]


def test_ids_that_the_tower_does_not_have():
    model = tower()
    for wrong, message in ((20, "ids of 0 to 19, found 20"), (-1, "found -1")):
        rows = np.where(ROWS == 3, wrong, ROWS)
        with pytest.raises(ConfigError, match=message):
            model(rows)
        tokens = jax.jit(lambda ids: model(ids).tokens)(rows)  # cannot raise; never clamped
        assert np.isnan(tokens[0, 1:]).all()
        assert np.isfinite(tokens[1]).all()
    with pytest.raises(ConfigError, match=r"end token 18 in every text.*row 1 \(one of 1\)"):
        model(np.array([[END, 1], [START, 1]]))
    with pytest.raises(ConfigError, match="at most 6 tokens, found 7"):
        model(np.zeros((1, 7), np.int32))
    with pytest.raises(ConfigError, match="an end token among its 20 ids, found 20"):
        dataclasses.replace(TEXT, end_id=20)


def test_what_is_no_ids(unchecked):
    wrong = {r"int\d+\[6\]": ROWS[0], "float32": ROWS.astype(np.float32), "str": "a dog"}
    for found, value in wrong.items():
        with pytest.raises(ConfigError, match=f"token ids, an array of integers .* found {found}"):
            tower()(value)


def test_special_ids_of_hugging_face_both_ways():
    settings = CLIP.to_hf()
    text = settings["text_config"]
    assert (text["bos_token_id"], text["eos_token_id"], "pad_token_id" in text) == (17, 18, False)
    assert ClipConfig.from_hf(settings) == CLIP
    openai = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    legacy = ClipConfig.from_hf(settings | {"text_config": text | openai})
    assert (legacy.text.start_id, legacy.text.end_id, legacy.text.pad_id) == (0, None, 1)
    assert openai.items() <= legacy.to_hf()["text_config"].items()
    # The default belongs to the vocabulary of OpenAI's models.
    assert ClipConfig.from_hf({"vision_config": {}, "text_config": {}}).text.end_id == 49407
    small = settings | {"text_config": {k: v for k, v in text.items() if k != "eos_token_id"}}
    assert ClipConfig.from_hf(small).text.end_id is None
    for wrong in (None, "18", [18], 18.0, True, -1):
        with pytest.raises(ConfigError, match="eos_token_id: expected an integer"):
            ClipConfig.from_hf(settings | {"text_config": text | {"eos_token_id": wrong}})
    with pytest.raises(ConfigError, match="among its 20 ids, found 25"):
        ClipConfig.from_hf(settings | {"text_config": text | {"eos_token_id": 25}})
    with pytest.raises(ConfigError, match="eos_token_id is 2"):
        dataclasses.replace(CLIP, text=dataclasses.replace(TEXT, end_id=2)).to_hf()


def test_special_ids_of_open_clip_both_ways():
    settings = CLIP.to_open_clip()
    text = settings["text_cfg"]
    assert (text["pool_type"], text["eos_id"]) == ("eos", 18)
    assert ClipConfig.from_open_clip(settings).text.end_id == 18
    last = dataclasses.replace(CLIP, text=dataclasses.replace(TEXT, end_id=19)).to_open_clip()
    assert "pool_type" not in last["text_cfg"]  # "argmax" finds it
    assert ClipConfig.from_open_clip(last).text.end_id is None
    with pytest.raises(ConfigError, match="pool_type 'argmax' or 'eos', found 'last'"):
        ClipConfig.from_open_clip(settings | {"text_cfg": text | {"pool_type": "last"}})


def test_old_settings_of_the_towers_win_as_in_transformers():
    """With the defaults of what they leave out: `transformers` builds a whole tower of them."""
    settings = CLIP.to_hf()
    vision, text = settings["vision_config"], settings["text_config"]
    new = {**vision, "hidden_act": "gelu"}
    found = ClipConfig.from_hf(settings | {"vision_config_dict": new})
    assert (found.vision.act, found.text.act) == ("gelu", "quick_gelu")
    assert VisionConfig.from_hf(settings | {"vision_config_dict": new}) == found.vision
    partial = {key: value for key, value in text.items() if key != "layer_norm_eps"}
    old = settings | {
        "text_config": text | {"layer_norm_eps": 1e-3},
        "text_config_dict": partial | {"hidden_act": "gelu"},
    }
    assert (ClipConfig.from_hf(old).text.eps, ClipConfig.from_hf(old).text.act) == (1e-5, "gelu")
    del old["text_config"]
    assert ClipConfig.from_hf(old).text.act == "gelu"
    assert ClipConfig.from_hf(settings | {"vision_config_dict": None}) == CLIP


def test_old_settings_of_the_towers_are_refused_where_transformers_ignores_them():
    settings = SiglipConfig.base_224().to_hf()
    same = settings | {"vision_config_dict": settings["vision_config"]}
    assert SiglipConfig.from_hf(same) == SiglipConfig.base_224()
    other = settings | {"text_config_dict": {"num_hidden_layers": 3}}
    with pytest.raises(ConfigError, match=r"text_config_dict.*num_hidden_layers"):
        SiglipConfig.from_hf(other)
