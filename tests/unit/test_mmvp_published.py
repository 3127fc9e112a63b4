"""The paper's tables agree with each other: means, the CLIP curve, correlations."""

from __future__ import annotations

import numpy as np
import pytest

from perception_jax.evals.vqa import mmvp
from perception_jax.systems.mmvp import encoders, published


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
    assert encoders.encoder_of("some/model") == encoders.Encoder(source="some/model")


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
