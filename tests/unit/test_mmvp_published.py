"""The paper's tables agree with each other; its encoders by name."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from perception_jax import api
from perception_jax.data.processors import ImageProcessor
from perception_jax.evals.vqa import mmvp
from perception_jax.models.clip.modeling import Clip
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.dinov2.modeling import Dinov2
from perception_jax.systems.mmvp import encoders, published, vlm
from perception_jax.systems.mmvp.embed import ImageEmbedder
from perception_jax.testing import tiny_clip
from tests.arrays import drawn


def test_every_row_has_nine_patterns_and_their_mean():
    assert len(published.SHORT_PATTERNS) == len(mmvp.PATTERNS)
    for name, row in published.MMVP_VLM.items():
        assert len(row.patterns) == len(mmvp.PATTERNS), name
        # One pair is 6.7; all are multiples of it, and the mean is theirs.
        np.testing.assert_allclose(
            np.round(np.array(row.patterns) * 0.15), row.patterns * np.array(0.15), atol=0.02
        )
        assert abs(np.mean(row.patterns) - row.mean) < 0.06, name
        assert str(row.pixels) in name


def test_the_encoders_are_the_rows_of_the_table():
    assert [encoders.ENCODERS[name].row for name in encoders.PAPER] == list(published.MMVP_VLM)
    assert encoders.encoder_of("openai-l14=/weights").source == "/weights"
    assert encoders.encoder_of("openai-l14=/weights").image["mode"] == "tv_crop"
    assert encoders.encoder_of("some/model") == encoders.PublishedEncoder(source="some/model")


def test_the_clip_curve_is_the_plotted_one():
    plotted = (6.7, 20.0, 33.3, 15.6, 11.1, 46.7, 22.2, 8.9, 22.2)
    np.testing.assert_allclose(published.clip_curve(), plotted, atol=0.1)


@pytest.mark.parametrize("model", ["LLaVA-1.5", "Gemini", "GPT-4V"])
def test_correlations_of_the_plotted_points_are_the_printed_ones(model):
    found = published.correlation_with_clip(published.MMVP_BY_PATTERN[model])
    assert round(found, 2) == published.CORRELATION[model]


def test_instructblip_needs_another_colour_point_than_the_plotted_one():
    points = list(published.MMVP_BY_PATTERN["InstructBLIP"])
    assert round(published.correlation_with_clip(points), 2) == 0.61
    points[mmvp.PATTERNS.index("Color and Appearance")] = 30.8
    found = published.correlation_with_clip(points)
    assert round(found, 2) == published.CORRELATION["InstructBLIP"]


@pytest.mark.parametrize("name", ["embed", "text"])
def test_encoders_multiply_in_float32_wherever_they_run(name):
    """By default TPUs and GPUs round the factors of float32 products."""
    model = jax.eval_shape(lambda: Clip(tiny_clip.CONFIG, rngs=nnx.Rngs(params=0)))
    embedder = ImageEmbedder(
        api.Loaded(model=model, config=tiny_clip.CONFIG, processor=tiny_clip.PROCESSOR)
    )
    with jax.default_matmul_precision("default"):
        if name == "embed":
            pixels = jax.ShapeDtypeStruct((2, tiny_clip.SIZE, tiny_clip.SIZE, 3), np.uint8)
            text = str(jax.make_jaxpr(embedder._embed)(model, pixels))
        else:
            ids = jax.ShapeDtypeStruct((2, tiny_clip.CONTEXT), np.int32)
            text = str(jax.make_jaxpr(vlm._embed_texts)(model, ids))
    assert "dot_general" in text
    assert "Precision.DEFAULT" not in text
    assert text.count("HIGHEST") > 0


def test_a_named_encoder_replaces_transform_and_positions(tmp_path):
    config = Dinov2Config(image_size=28, patch_size=14, width=32, depth=1, heads=4, mlp_dim=64)
    loaded = api.Loaded(
        model=drawn(lambda: Dinov2(config, rngs=nnx.Rngs(params=0))),
        config=config,
        processor=api.Processor(image=ImageProcessor(size=28), tokenizer=None),
    )
    api.export(loaded, tmp_path / "hf")
    found = encoders.open_encoder(f"dinov2-l14={tmp_path}/hf")
    image = found.processor.image
    assert (image.size, image.resize, image.mode) == (224, 256, "tv_crop")
    assert found.model.position_offset == 0.1
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(found.model))} == {"float32"}
    # What it moves: positions of an image of another size than the stored one.
    plain = encoders.open_encoder(f"{tmp_path}/hf")
    assert plain.model.position_offset == 0.0
    assert plain.processor.image.size == 28
    grids = [np.asarray(one.model.positions((16, 16))) for one in (found, plain)]
    assert np.abs(grids[0] - grids[1]).max() > 1e-4
