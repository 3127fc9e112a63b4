"""Boxes survive the way to the model's pixels and back, for every mode and odd sizes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from perception_jax.data.geometry import Geometry
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.transforms import Augment

MODES = ("hf_crop", "tv_crop", "squash", "llava_pad")
sides = st.integers(1, 67)


@st.composite
def boxes(draw):
    corners = draw(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4))
    x1, x2 = sorted(corners[:2])
    y1, y2 = sorted(corners[2:])
    return np.array([[x1, y1, x2, y2]], np.float64)


@given(sides, sides, st.integers(1, 29), st.integers(0, 9), st.sampled_from(MODES), boxes())
@settings(max_examples=150, deadline=None)
def test_round_trip(width, height, size, margin, mode, box):
    resize = None if mode == "squash" else size + margin
    processor = ImageProcessor(size=size, mode=mode, resize=resize)
    processed = processor(np.zeros((height, width, 3), np.uint8))
    assert processed.pixels.shape == (size, size, 3)
    original = box * np.array([width, height, width, height], np.float64)
    for geometry in (processed.geometry, processed.geometry.flipped()):
        assert geometry.source == (width, height)
        assert geometry.target == (size, size)
        back = geometry.inverse_boxes(geometry.boxes(original))
        np.testing.assert_allclose(back, original, rtol=0, atol=1e-9 * (width + height))


@given(st.integers(9, 67), st.integers(9, 67), st.sampled_from(MODES), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_geometry_points_at_the_pixels_that_were_moved(width, height, mode, seed):
    """A white left part of a black image is found where the geometry says, after augmentation."""
    split = width // 2
    image = np.zeros((height, width, 3), np.uint8)
    image[:, :split] = 255
    processor = ImageProcessor(size=32, mode=mode, pad_colour=(0, 0, 0))
    augment = Augment(min_area=0.5, flip=0.5)
    processed = augment(image, processor, np.random.default_rng(seed))
    white = np.array([[0, 0, split, height]], np.float64)
    x1, y1, x2, y2 = processed.geometry.clip(processed.geometry.boxes(white))[0]
    share = (x2 - x1) * (y2 - y1) / 32**2
    # The kernel blurs the edges by a pixel or two.
    assert abs(processed.pixels.mean() / 255 - share) < 0.1


@given(boxes(), boxes())
@settings(max_examples=100, deadline=None)
def test_kept_share_is_the_overlap_with_the_window(box, window):
    size = np.array([200, 100, 200, 100], np.float64)
    box, (left, top, right, bottom) = box * size, np.rint(window * size)[0].astype(int).tolist()
    geometry = Geometry.identity(200, 100).cropped(left, top, right - left, bottom - top)
    share = geometry.kept_share(box)[0]
    x1, y1, x2, y2 = box[0]
    inside = max(0, min(x2, right) - max(x1, left)) * max(0, min(y2, bottom) - max(y1, top))
    area = (x2 - x1) * (y2 - y1)
    assert (
        share == (np.clip(inside / area, 0, 1) if area else 0) or abs(share - inside / area) < 1e-6
    )
    assert geometry.keeps(box, min_share=0.5)[0] == (share >= 0.5)
