"""Colours, overlays and the contact sheet: hand-computed pixels and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageFont

from perception_jax.errors import DataError
from perception_jax.viz import colormap, overlay
from perception_jax.viz.grid import grid, wrap

WHITE, NEAR_BLACK = (255, 255, 255), (19, 21, 24)


def grey(height: int, width: int, value: int = 100) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def contrast(first: tuple, second: tuple) -> float:
    """Contrast ratio in [1, 21] (WCAG 2.2)."""
    low, high = sorted((colormap.luminance(first), colormap.luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_sequential_map_rises_in_lightness():
    colours = colormap.apply(np.arange(256.0)).tolist()
    lightness = [colormap.luminance(tuple(colour)) for colour in colours]
    assert (np.diff(lightness) > 0).mean() > 0.98  # rounded to 8 bits
    assert lightness[0] < 0.01
    assert lightness[-1] > 0.8


def test_palette_reads_on_light_and_dark():
    colours = [colormap.categorical(k) for k in range(len(colormap.CATEGORICAL))]
    for colour in colours:
        assert contrast(colour, WHITE) >= 3.0
        assert contrast(colour, NEAR_BLACK) >= 3.0
    assert len(set(colours)) == len(colours)
    assert colormap.categorical(len(colours)) == colours[0]


def test_text_has_the_higher_contrast_of_black_and_white():
    assert contrast((0, 0, 0), WHITE) == pytest.approx(21.0)
    assert contrast((119, 119, 119), WHITE) == pytest.approx(4.48, abs=0.01)
    for colour in np.random.default_rng(0).integers(0, 256, (200, 3)).tolist():
        ink = colormap.text_colour(tuple(colour))
        other = (0, 0, 0) if ink == WHITE else WHITE
        # Both are equal at a luminance of 0.1791, which the code rounds.
        assert contrast(ink, tuple(colour)) >= contrast(other, tuple(colour)) - 0.01


def test_apply_uses_the_range_given():
    values = np.array([-5.0, 0.0, 1.0, 9.0])
    low, high = colormap.apply(np.array([0, 1]))
    assert (colormap.apply(values, vmin=0, vmax=1) == [low, low, high, high]).all()
    assert (colormap.apply(values)[[0, 3]] == [low, high]).all()
    assert (colormap.apply(np.full(3, 7.0)) == low).all()


def test_heatmap_blends_by_value():
    image = grey(8, 8)
    values = np.array([[0.0, 1.0]])
    out = overlay.heatmap(image, values, alpha=0.8)
    low, high = colormap.apply(np.array([0, 1]))
    assert out[4, 0].tolist() == np.round(0.6 * 100 + 0.4 * low).tolist()
    assert out[4, 7].tolist() == np.round(0.2 * 100 + 0.8 * high).tolist()
    assert (overlay.heatmap(image, values, alpha=0.0) == image).all()
    assert (image == 100).all()


def test_upsample_is_bilinear_with_half_pixel_centres():
    up = overlay.upsample(np.array([[0.0, 1.0]]), 1, 4)
    np.testing.assert_allclose(up, [[0.0, 0.25, 0.75, 1.0]], atol=1e-6)


def test_maps_with_nan_and_float_images_are_refused():
    values = np.zeros((2, 3))
    values[1, 2] = np.nan
    with pytest.raises(DataError, match=r"found nan at index \(1, 2\) of shape \(2, 3\)"):
        overlay.heatmap(grey(4, 4), values)
    with pytest.raises(DataError, match=r"found float64\[4, 4, 3\] in heatmap"):
        overlay.check_image(np.zeros((4, 4, 3)), "heatmap")
    with pytest.raises(DataError, match=r"found uint8\[0, 4, 3\]"):
        overlay.check_image(np.zeros((0, 4, 3), np.uint8), "grid")


@pytest.mark.parametrize("box", [[2.0, 3.0, 7.0, 9.0], [2.5, 3.5, 6.5, 8.5]])
def test_draw_boxes_outlines_the_pixels_that_the_box_touches(box):
    out = overlay.draw_boxes(grey(12, 12), np.array([box]), colours=[(255, 0, 0)])
    red = (out == (255, 0, 0)).all(-1)
    expected = np.zeros((12, 12), bool)
    expected[3:9, 2:7] = True
    expected[4:8, 3:6] = False
    assert (red == expected).all()


def test_labels_stay_inside_the_image():
    colours = [(255, 0, 0), (0, 0, 255)]
    boxes = np.array([[70.0, 2.0, 99.0, 30.0], [0.0, 60.0, 50.0, 99.0]])
    out = overlay.draw_boxes(grey(100, 100), boxes, ["long label", "low"], colours, font_size=14)
    red, blue = ((out == c).all(-1) for c in colours)
    # No room above or to the right: moved left and inside. Room above: above.
    assert red[:, :70].sum() > 200
    assert red[1].sum() == 0
    assert blue[:60].sum() > 100
    # The ink of the labels: black on red, white on blue.
    assert (out[2:30] == 0).all(-1).sum() > 10
    assert (out[40:60] == 255).all(-1).sum() > 10


def test_boxes_far_outside_and_empty_are_drawn_or_cut():
    boxes = np.array([[-1e9, -1e9, 1e9, 1e9], [5.0, 5.0, 5.0, 5.0]])
    colours = [(255, 0, 0), (0, 0, 255)]
    out = overlay.draw_boxes(grey(10, 10), boxes, colours=colours, width=1)
    assert not (out == colours[0]).all(-1).any()
    blue = (out == colours[1]).all(-1)
    assert blue[5, 5]
    assert blue.sum() <= 2
    assert (overlay.draw_boxes(grey(4, 4), np.zeros((0, 4))) == grey(4, 4)).all()


def test_bad_boxes_are_named():
    with pytest.raises(DataError, match=r"found \[3\.0, 0\.0, 1\.0, 2\.0\] at box 1"):
        overlay.draw_boxes(grey(9, 9), np.array([[0.0, 0, 1, 1], [3.0, 0, 1, 2]]))
    with pytest.raises(DataError, match="1 boxes, 2 labels and 1 colours"):
        overlay.draw_boxes(grey(9, 9), np.zeros((1, 4)), ["a", "b"])


def test_masks_are_tinted_with_a_solid_edge():
    mask = np.zeros((1, 6, 6), bool)
    mask[0, 1:4, 1:4] = True
    out = overlay.draw_masks(grey(6, 6), mask, [(200, 0, 0)], alpha=0.5)
    assert out[2, 2].tolist() == [150, 50, 50]
    assert out[1, 1].tolist() == [200, 0, 0]
    assert out[4, 4].tolist() == [100, 100, 100]
    with pytest.raises(DataError, match=r"masks \(1, 6, 6\) and 0 colours"):
        overlay.draw_masks(grey(6, 6), mask, [])


def test_grid_places_images_and_captions():
    red = np.zeros((10, 20, 3), np.uint8)
    red[..., 0] = 255
    sheet = grid([red, red, red], ["one", "", "x"], columns=2, cell=40, gap=10, font_size=12)
    assert sheet.shape[1] == 2 * 40 + 3 * 10
    is_red = (sheet == (255, 0, 0)).all(-1)
    # Fitted to the width, centred in height: rows 20 to 39 of the first cell.
    assert is_red[20:40, 10:50].all()
    assert is_red[:20].sum() == 0
    assert is_red.sum() == 3 * 40 * 20
    ink = (sheet < 100).all(-1)
    assert ink[50:80, 10:50].any()
    assert not ink[50:80, 60:].any()
    with pytest.raises(DataError, match="1 images and 2 captions"):
        grid([red], ["a", "b"])


def test_wrap_keeps_every_character_and_the_width():
    font = ImageFont.load_default(13)
    text = "a short caption with one incomprehensibilities-and-more word\nsecond line"
    lines = wrap(text, 80, font)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert all(font.getlength(line) <= 80 for line in lines)
    assert lines[-1].endswith("line")
    assert "second line" in lines
    assert wrap("", 80, font) == []
