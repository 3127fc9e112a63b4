"""A checkpoint's tokenizer and its text tower: ids written and read back, and what does not fit."""

from __future__ import annotations

import dataclasses
import json

import pytest
from flax import nnx

import perception_jax
from perception_jax import api
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.tokenization import AddedToken, ClipTokenizer
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.models.clip.architecture import with_tokenizer
from perception_jax.models.clip.config import ClipConfig, VisionConfig
from perception_jax.models.clip.modeling import Clip
from perception_jax.nn.text_tower import TextConfig
from tests.arrays import drawn

SIZES = {"width": 8, "depth": 1, "heads": 2, "mlp_dim": 8}
START, END, ADDED = 598, 599, 600
TOKENIZER = ClipTokenizer.shipped(600, 8, clean="hf")
TOY = dataclasses.replace(TOKENIZER, added=(AddedToken("<cat-toy>", ADDED),))
CONFIG = ClipConfig(
    vision=VisionConfig(image_size=8, patch_size=4, **SIZES),
    text=TextConfig(vocab_size=601, context=8, end_id=END, start_id=START, pad_id=END, **SIZES),
    embed_dim=4,
)


@pytest.fixture(scope="module")
def loaded():
    """One id behind the end token, and a tokenizer that has it."""
    model = drawn(lambda: Clip(CONFIG, rngs=nnx.Rngs(params=0)))
    processor = api.Processor(image=ImageProcessor(size=8), tokenizer=TOY)
    return api.Loaded(model=model, config=CONFIG, processor=processor)


def with_text(loaded, tokenizer, **changes):
    text = dataclasses.replace(CONFIG.text, **changes)
    processor = dataclasses.replace(loaded.processor, tokenizer=tokenizer)
    config = dataclasses.replace(CONFIG, text=text)
    return dataclasses.replace(loaded, config=config, processor=processor)


def edit(path, key, **changes):
    content = json.loads(path.read_text())
    section = content["model_cfg"][key] if "model_cfg" in content else content[key]
    section |= changes
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("layout", ["hf", "jax", "reference"])
def test_an_added_token_goes_through_every_layout(loaded, tmp_path, layout):
    perception_jax.export(loaded, tmp_path, layout=layout)
    again = perception_jax.load(tmp_path)
    assert again.config.text.end_id == again.model.text.end_id == END
    assert again.processor.tokenizer.added == TOY.added
    rows = again.processor.texts("the <cat-toy>")
    assert rows[0].tolist() == TOY(["the <cat-toy>"]).ids[0].tolist()
    assert ADDED in rows[0].tolist()
    if layout == "reference":  # open_clip's own tokenizer knows no such token
        text = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
        assert (text["pool_type"], text["eos_id"], text["hf_tokenizer_name"]) == (
            *("eos", END),
            "in-this-folder",
        )
    else:
        assert again.config == CONFIG


def test_ids_that_no_setting_says_are_those_of_the_tokenizer():
    """Unless the tower is read at the largest id and that is not the end token."""
    unknown = dict.fromkeys(("start_id", "end_id", "pad_id"))
    plain = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, **unknown))
    text = with_tokenizer(plain, TOKENIZER).text
    assert (text.start_id, text.end_id, text.pad_id) == (START, END, END)
    assert with_tokenizer(plain, TOY) == plain
    assert plain.to_hf()["text_config"]["eos_token_id"] == 2
    legacy = dataclasses.replace(plain, text=dataclasses.replace(plain.text, start_id=0, pad_id=1))
    assert with_tokenizer(legacy, TOKENIZER) == legacy  # OpenAI's settings say so


def test_a_tokenizer_that_does_not_fit_is_refused(loaded, tmp_path):
    for tokenizer, changes, message in (
        (TOY, {"vocab_size": 600}, "600 token embeddings.*ids up to 600"),
        (TOY, {"end_id": 598}, "end token 598"),
    ):
        with pytest.raises(CheckpointError, match=message):
            perception_jax.export(with_text(loaded, tokenizer, **changes), tmp_path / "no")
    perception_jax.export(loaded, tmp_path / "a")
    ClipTokenizer.shipped(700, 8).save(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"/a: .*601 token embeddings.*ids up to 699"):
        perception_jax.load(tmp_path / "a")
    TOY.save(tmp_path / "a")
    edit(tmp_path / "a" / "config.json", "text_config", eos_token_id=ADDED)
    with pytest.raises(CheckpointError, match=r"read at the end token 600.*ends texts with 599"):
        perception_jax.load(tmp_path / "a")
    edit(tmp_path / "a" / "config.json", "text_config", eos_token_id=900)
    with pytest.raises(ConfigError, match="among its 601 ids, found 900"):
        perception_jax.load(tmp_path / "a")


def test_no_tokenizer_rather_than_a_wrong_one(loaded, tmp_path):
    """open_clip's own is CLIP's; a folder with another's files, or whose settings name another, has
    none that is read here."""
    perception_jax.export(loaded, tmp_path, layout="reference")
    for file in tmp_path.iterdir():
        if file.suffix in (".txt", ".json") and file.name != "open_clip_config.json":
            file.unlink()
    settings = tmp_path / "open_clip_config.json"
    for name in ("bert-base-uncased", None):  # None: CLIP's own, too large for 601 embeddings
        edit(settings, "text_cfg", hf_tokenizer_name=name)
        assert perception_jax.load(tmp_path).processor.tokenizer is None
    model = {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"[UNK]": 0}}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    found = perception_jax.load(tmp_path)
    assert found.processor.tokenizer is None
    with pytest.raises(CheckpointError, match="without a supported tokenizer"):
        found.processor.texts("a")


def test_the_tokenizer_that_open_clip_brings_along():
    from perception_jax.models.open_clip import brings_tokenizer

    assert brings_tokenizer({"model_cfg": {"text_cfg": {}}}, 49408)
    assert brings_tokenizer({"text_cfg": {"tokenizer_kwargs": {"clean": "lower"}}}, 49408)
    assert not brings_tokenizer({"text_cfg": {}}, 32000)
    for other in (
        {"hf_tokenizer_name": "bert-base-uncased"},
        {"tokenizer_kwargs": {"clean": "canonicalize"}},
        {"tokenizer_kwargs": {"additional_special_tokens": ["<x>"]}},
    ):
        assert not brings_tokenizer({"text_cfg": other}, 49408)
