"""Predictions for single images: what all have in common, as JSON and for a program."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest

from perception_jax.data.processors import ImageProcessor
from perception_jax.errors import ConfigError
from perception_jax.inference.single_image import (
    ImagePrediction,
    Viewer,
    as_json,
    listed,
    results_of,
)

IMAGE = np.zeros((20, 40, 3), np.uint8)


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    name: str
    map: np.ndarray | None

    @property
    def long(self) -> bool:
        return len(self.name) > 3


def prediction(scale: float = 1.0) -> ImagePrediction:
    view = Viewer(ImageProcessor(size=16), patch=8, side=64, scale=scale)(IMAGE)
    return ImagePrediction(view=view, attention_of="a head", attention=np.full((2, 2), 1 / 3))


def test_numbers_of_a_map_have_five_digits():
    assert listed(np.array([[1 / 3, 12345.678]])) == [[0.33333, 12346.0]]


def test_fields_and_properties_become_json():
    scores = (Score("kite", np.array([[0.5]])), Score("dog", None))
    assert as_json(scores) == [
        {"name": "kite", "map": [[0.5]], "long": True},
        {"name": "dog", "map": None, "long": False},
    ]


def test_a_prediction_has_the_sizes_of_its_view():
    found = prediction(scale=2.0)
    assert found.sizes() == ("40 x 20", "32 x 32")
    assert found.picture.shape == (64, 64, 3)
    assert found.to_json() == {
        "image_size": [40, 20],
        "input_size": [32, 32],
        "region": [10.0, 0.0, 30.0, 20.0],
        "grid": [2, 2],
        "attention_of": "a head",
        "attention": [[0.33333] * 2] * 2,
    }
    with pytest.raises(ConfigError, match="scale: expected a number above 0"):
        prediction(scale=0.0)


def test_a_program_gets_a_picture_json_and_a_line():
    result = results_of(
        lambda path: prediction(),
        lambda found, name: np.full((1, len(name), 3), found.input_size[0], np.uint8),
        lambda found: [found.attention_of, "twice"],
        {"model": "small"},
    )(pathlib.Path("folder/one.png"))
    assert result.line == "  a head  twice"
    assert (result.picture.shape, result.picture[0, 0, 0]) == ((1, 7, 3), 16)
    assert result.facts == {"model": "small", "image": "folder/one.png", **prediction().to_json()}
