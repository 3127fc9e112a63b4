"""Maps over pictures, bars of shares, and strips put below each other."""

from __future__ import annotations

import numpy as np
import pytest

from perception_jax.viz import colormap, overlay, sheet
from perception_jax.viz.sheet import ShareBar, share_bars

FULL = colormap.categorical(2)


def filled(row: ShareBar, **columns) -> np.ndarray:
    """Columns that the bar's colour reaches, at half its height."""
    strip = share_bars([row], 400, **columns)
    return np.flatnonzero((strip[len(strip) // 2] == FULL).all(axis=-1))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_bar_is_as_long_as_its_share(share):
    row = ShareBar(name="", share=share, note="")
    found = filled(row, name_width=0, bar_width=201)
    if share:
        assert (found[0], found[-1]) == (sheet.GAP, sheet.GAP + round(200 * share))
    assert len(found) == (round(200 * share) + 1 if share else 0)
    weak = ShareBar(name="", share=share, note="", strong=False)
    assert len(filled(weak, name_width=0, bar_width=201)) == 0


def test_a_long_name_does_not_reach_into_its_bar():
    row = ShareBar(name="a name that has no end " * 5, share=0.0, note="")
    bar = sheet.GAP + 100 + sheet.GAP // 2
    strip = share_bars([row], 400, name_width=100, bar_width=50)
    beside = strip[:, bar - sheet.GAP // 2 : bar]
    assert (beside == sheet.PAPER).all()
    assert (strip[:, :bar] < 128).any()


def test_a_map_is_warm_where_it_is_high_and_of_no_other_colours():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[..., 0] = 255  # the picture's own red must not be taken for the map's
    values = np.zeros((4, 4), np.float32)
    values[3, 0] = 1
    shown = overlay.over_grey(picture, values).astype(int)
    warm = (shown[..., 0] - shown[..., 2] > 60) & (shown.min(axis=-1) > 60)
    rows, columns = np.nonzero(warm)
    assert rows.min() >= 40
    assert columns.max() < 24


def test_strips_are_widened_and_stacked():
    parts = [np.zeros((2, 3, 3), np.uint8), np.zeros((1, 5, 3), np.uint8)]
    page = sheet.stacked(parts, 5)
    assert page.shape == (3, 5, 3)
    assert (page[:2, 3:] == 255).all()
    assert (page[:2, :3] == 0).all()


def test_lines_wrap_within_their_width():
    short, long = (sheet.line(text, 300, indent=50) for text in ("word", "word " * 20))
    assert len(long) > 2 * len(short)
    assert (long[:, : sheet.GAP + 50] == 255).all()
    assert (long[:, 300 - sheet.GAP :] == 255).all()


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_the_legend_of_maps_stays_within_its_width(columns):
    width, widest = sheet.width_of(columns), sheet.legend(2000)
    found = sheet.legend(width)
    assert (found[:, -sheet.GAP :] == 255).all()
    # Nothing is cut: as much ink as in one line.
    assert (found < 128).sum() == (widest < 128).sum()
