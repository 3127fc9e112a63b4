"""`launch.convert` on a tiny CLIP: through all layouts and back, verified, with the key report."""

from __future__ import annotations

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
from perception_jax.models.params import flatten, unflatten

SIZES = {"width": 8, "depth": 2, "heads": 2, "mlp_dim": 16}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "source"
    config = ClipConfig(
        vision=VisionConfig(image_size=8, patch_size=4, **SIZES),
        text=TextConfig(vocab_size=20, context=5, **SIZES),
        embed_dim=4,
    )
    model = nnx.eval_shape(lambda: Clip(config, rngs=nnx.Rngs(params=0)))
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


def test_mistakes_end_with_one_message(source, tmp_path, capsys):
    assert run(source, source, "--to=jax") == 1
    assert "overwrite" in capsys.readouterr().err
    assert run(tmp_path / "nowhere", tmp_path / "x", "--to=jax") == 1
    assert "nowhere" in capsys.readouterr().err
    assert run(source, tmp_path / "x", "--to=jaxx") == 2
    assert "Did you mean jax?" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
