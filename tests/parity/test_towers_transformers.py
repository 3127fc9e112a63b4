"""Image towers alone against `transformers`: saved alone, inside a LLaVA, as a part of a whole
model, and from a single file."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

import perception_jax
from perception_jax.errors import CheckpointError
from perception_jax.nn.taps import Taps
from tests.arrays import run
from tests.parity.measures import Row
from tests.parity.torch_code import assert_bit_equal, channels_first, randomised

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOWER = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
PIXELS = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)


def tower(kind: str):
    """A model and its last hidden state, pooled token and embedding for `PIXELS`."""
    family = "Siglip" if kind.startswith("Siglip") else "CLIP"
    config = getattr(transformers, f"{family}VisionConfig")(**TOWER, projection_dim=20)
    model = randomised(getattr(transformers, kind)(config))
    return model, expected(model)


def expected(model):
    with torch.no_grad():
        out = model(pixel_values=channels_first(PIXELS))
    return [
        getattr(out, name, None) for name in ("last_hidden_state", "pooler_output", "image_embeds")
    ]


def assert_same(row, model, theirs) -> None:
    out = run(model, jnp.asarray(PIXELS))
    for ours, found in zip((out.tokens, out.pooled, out.embedding), theirs, strict=True):
        if found is not None:
            row.close(ours, found)


@pytest.mark.parametrize(
    "kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection", "SiglipVisionModel"]
)
@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
def test_alone_both_ways(tmp_path, kind, binary):
    theirs, outputs = tower(kind)
    if binary:
        theirs.config.save_pretrained(tmp_path / "theirs")
        torch.save(theirs.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    else:
        theirs.save_pretrained(tmp_path / "theirs")
    loaded = perception_jax.load(tmp_path / "theirs")
    assert loaded.config.embed_dim == (20 if "Projection" in kind else None)
    row = Row(f"tiny {kind}, {'.bin' if binary else 'safetensors'}", "Hugging Face", "transformers")
    row.read(loaded.report)
    assert_same(row, loaded.model, outputs)
    for name, layout in (("hf", "hf"), ("jax", "jax"), ("timm", "timm"), ("again", "hf")):
        perception_jax.export(loaded, tmp_path / name, layout=layout)
        loaded = perception_jax.load(tmp_path / name)
        assert_same(row, loaded.model, outputs)
    again = getattr(transformers, kind).from_pretrained(tmp_path / "again").eval()
    assert_bit_equal(theirs, again)
    for before, after in zip(outputs, expected(again), strict=True):
        assert before is after is None or torch.equal(before, after)
    row.both_ways = True


def test_the_tower_of_a_llava(tmp_path):
    """Under each of the names that LLaVA's code bases have given it."""
    text = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER), text_config=text, image_token_index=60
    )
    llava = randomised(transformers.LlavaForConditionalGeneration(config))
    llava.save_pretrained(tmp_path / "hf")
    inner = llava.model.vision_tower
    with torch.no_grad():
        states = inner(channels_first(PIXELS), output_hidden_states=True).hidden_states

    loaded = perception_jax.load(tmp_path / "hf", prefix="vision_tower.")
    out = run(loaded.model, jnp.asarray(PIXELS), taps=Taps(hidden=(-2,)))
    row = Row("tiny CLIP inside a LLaVA, a part by its prefix", "Hugging Face", "transformers")
    row.read(loaded.report)
    row.close(out.hidden[0], states[-2])
    assert any(name.startswith("language_model.") for name in loaded.report.aside)
    assert "outside the requested part" in str(loaded.report)

    # The authors' own checkpoints nest it deeper, and their settings say no sizes.
    prefix = "model.vision_tower.vision_tower."
    names = {f"{prefix}vision_model.{k}": v for k, v in inner.state_dict().items()}
    torch.save(names | {"lm_head.weight": torch.zeros(3, 3)}, tmp_path / "mm.bin")
    settings = inner.config.to_dict() | {"model_type": "clip_vision_model"}
    again = perception_jax.load(tmp_path / "mm.bin", config=settings, prefix=prefix)
    out = run(again.model, jnp.asarray(PIXELS), taps=Taps(hidden=(-2,)))
    row.close(out.hidden[0], states[-2])
    assert again.report.aside == ("lm_head.weight",)


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_parts_and_single_files_of_a_whole_model(tmp_path, family):
    text = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "vocab_size": 60,
        "max_position_embeddings": 9,
    }
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=TOWER)
    model = randomised(getattr(transformers, f"{family}Model")(config))
    model.save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        outputs = model.vision_model(channels_first(PIXELS))
    part = perception_jax.load(tmp_path / "whole", prefix="vision_model.")
    row = Row(f"tiny {family}, the image tower of a whole model", "Hugging Face", "transformers")
    row.read(part.report)
    assert_same(row, part.model, [outputs.last_hidden_state, outputs.pooler_output, None])
    assert "logit_scale" in part.report.aside

    file = tmp_path / "model.bin"
    torch.save({f"clip.{k}": v for k, v in model.state_dict().items()}, file)
    settings = json.loads((tmp_path / "whole" / "config.json").read_text())
    for given in (settings, tmp_path / "whole", tmp_path / "whole" / "config.json"):
        whole = perception_jax.load(file, config=given, prefix="clip.")
        assert whole.model.logit_scale.shape == ()
    with pytest.raises(CheckpointError, match=r"prefix 'vision\.'.*begin with clip\."):
        perception_jax.load(file, config=settings, prefix="vision.")


def test_sharded_bin_folders(tmp_path):
    """As `transformers` wrote large models before safetensors."""
    theirs, outputs = tower("CLIPVisionModel")
    theirs.config.save_pretrained(tmp_path)
    weights = theirs.state_dict()
    shards = [dict(list(weights.items())[k::2]) for k in range(2)]
    where = {}
    for k, shard in enumerate(shards):
        name = f"pytorch_model-{k + 1:05}-of-00002.bin"
        torch.save(shard, tmp_path / name)
        where |= dict.fromkeys(shard, name)
    index = json.dumps({"metadata": {"total_size": 0}, "weight_map": where})
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    loaded = perception_jax.load(tmp_path)
    row = Row("tiny CLIPVisionModel, .bin in two shards", "Hugging Face", "transformers")
    row.read(loaded.report)
    assert_same(row, loaded.model, outputs)
