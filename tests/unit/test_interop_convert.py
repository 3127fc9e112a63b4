"""`launch.convert` on a tiny CLIP: through all layouts and back, verified, with the key report."""

from __future__ import annotations

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import perception_jax
from launch import common, convert
from perception_jax.api import Loaded, Processor
from perception_jax.data.processors import ImageProcessor
from perception_jax.interop.checkpoint_dir import open_checkpoint
from perception_jax.interop.verify import compare_params
from perception_jax.models.clip.config import ClipConfig, TextConfig, VisionConfig
from perception_jax.models.clip.modeling import Clip
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.dinov2.modeling import Dinov2
from perception_jax.models.params import flatten, unflatten

SIZES = {"width": 8, "depth": 2, "heads": 2, "mlp_dim": 16}


def exported(make, config, folder):
    """A folder with a model that has random numbers in every leaf."""
    model = nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(params=0)))
    rng = np.random.default_rng(0)
    params = {
        path: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        for path, leaf in flatten(model).items()
    }
    loaded = Loaded(
        model=unflatten(model, params),
        config=config,
        processor=Processor(image=ImageProcessor(size=8), tokenizer=None),
    )
    perception_jax.export(loaded, folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    config = ClipConfig(
        vision=VisionConfig(image_size=8, patch_size=4, **SIZES),
        text=TextConfig(vocab_size=20, context=5, **SIZES),
        embed_dim=4,
    )
    return exported(Clip, config, tmp_path_factory.mktemp("clip") / "source")


def run(*words: str) -> int:
    return common.main(convert.PROGRAM, convert.run, [str(word) for word in words])


def test_through_all_layouts_and_back(source, tmp_path, capsys):
    for before, layout in ((source, "reference"), (source, "jax"), (tmp_path / "jax", "hf")):
        assert run(before, tmp_path / layout, f"--to={layout}", "--verify") == 0
        out = capsys.readouterr().out
        assert "every name accounted for" in out
        assert "all bit-equal" in out
    compare_params(open_checkpoint(source), open_checkpoint(tmp_path / "hf"))
    assert "vision/blocks/attention/q_proj/kernel" in open_checkpoint(tmp_path / "jax")
    assert "visual.conv1.weight" in open_checkpoint(tmp_path / "reference")


def test_a_change_of_dtype_is_reported(source, tmp_path, capsys):
    assert run(source, tmp_path / "half", "--to=hf", "--dtype=bfloat16", "--verify") == 0
    assert "float32 → bfloat16" in capsys.readouterr().out
    assert {str(spec.dtype) for spec in open_checkpoint(tmp_path / "half").specs.values()} == {
        "bfloat16"
    }


def test_a_part_goes_to_timm(source, tmp_path, capsys):
    arguments = ("--to=timm", "--prefix=vision_model.", "--verify")
    assert run(source, tmp_path / "tower", *arguments) == 0
    out = capsys.readouterr().out
    assert "aside" in out
    assert "all bit-equal" in out
    assert run(tmp_path / "tower" / "model.safetensors", tmp_path / "jax", "--to=jax") == 0
    alone = shutil.copy(tmp_path / "tower" / "model.safetensors", tmp_path / "alone.safetensors")
    assert run(alone, tmp_path / "no", "--to=jax") == 1
    assert "do not identify the model" in capsys.readouterr().err
    settings = f"--model_config={tmp_path / 'tower'}"
    assert run(alone, tmp_path / "given", "--to=jax", settings, "--verify") == 0


def test_what_a_layout_keeps_otherwise_is_named(tmp_path, capsys):
    config = Dinov2Config(**(SIZES | {"mlp_dim": 32}), image_size=8, patch_size=4, registers=2)
    folder = exported(Dinov2, config, tmp_path / "hf")
    assert run(folder, tmp_path / "timm", "--to=timm", "--verify") == 0
    out = capsys.readouterr().out
    assert "keeps class_embedding, mask_token, position_embedding in another form" in out
    assert run(tmp_path / "timm", tmp_path / "again", "--to=timm", "--verify") == 0
    assert "all bit-equal" in capsys.readouterr().out


def test_mistakes_end_with_one_message(source, tmp_path, capsys):
    assert run(source, source, "--to=jax") == 1
    assert "overwrite" in capsys.readouterr().err
    assert run(tmp_path / "nowhere", tmp_path / "x", "--to=jax") == 1
    assert "nowhere" in capsys.readouterr().err
    assert run(source, tmp_path / "x", "--to=jaxx") == 2
    assert "one of <hf|reference|timm|jax>" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
