"""Properties of generated scenes: what is drawn, what is annotated, and what a seed decides."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception_jax.data.scenes import concepts, palette
from perception_jax.data.scenes.backgrounds import draw_background
from perception_jax.data.scenes.concepts import colour_of, facing_of
from perception_jax.data.scenes.render import Rendered, render
from perception_jax.data.scenes.sample import SceneConfig, can_be_tinted, sample_spec
from perception_jax.data.scenes.source import draw_scene
from perception_jax.data.scenes.spec import (
    BACKGROUND_KINDS,
    TEST_STYLE,
    TRAIN_STYLES,
    Background,
    Placement,
    SceneSpec,
)
from perception_jax.data.scenes.sprites import load_sprite
from tools import build_sprites

CANVASES = ((32, 32), (64, 64), (48, 96), (128, 80))
SEEDS = st.integers(0, 2**32 - 1)
SPLITS = st.sampled_from(("train", "test", "held_out"))
FEW = settings(max_examples=25, deadline=None)

NAMES = st.sampled_from([concept.name for concept in concepts.concepts()])
PLAIN = Background(kind="flat", colours=("white",), seed=0)


def bounds(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.nonzero(mask)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@FEW
@given(seed=SEEDS, canvas=st.sampled_from(CANVASES), split=SPLITS)
def test_annotations_are_the_pixels(seed: int, canvas: tuple[int, int], split: str) -> None:
    config = SceneConfig(canvas=canvas, split=split)
    spec, rendered = draw_scene(np.random.default_rng(seed), config)

    assert rendered.image.shape == (*canvas, 3)
    assert len(rendered.objects) == len(spec.placements) == len(rendered.masks)
    assert config.count[0] <= len(spec.placements) <= config.count[1]
    assert rendered.masks.sum(axis=0).max() <= 1, "masks overlap"
    for item, mask in zip(rendered.objects, rendered.masks, strict=True):
        assert item.box == bounds(mask)
        assert config.min_visible <= item.visible <= 1.0


@FEW
@given(seed=SEEDS, split=SPLITS)
def test_splits_share_no_style_and_no_held_out_concept(seed: int, split: str) -> None:
    spec = sample_spec(np.random.default_rng(seed), SceneConfig(split=split))
    styles = {placement.style for placement in spec.placements}
    held_out = {concepts.by_name(p.concept).held_out for p in spec.placements}
    assert styles <= (set(TRAIN_STYLES) if split == "train" else {TEST_STYLE})
    assert held_out == {split == "held_out"}
    for far in spec.background.placements:
        assert far.style in TRAIN_STYLES
        assert not concepts.by_name(far.concept).held_out


@FEW
@given(seed=SEEDS)
def test_no_two_of_a_family_share_a_scene(seed: int) -> None:
    spec = sample_spec(np.random.default_rng(seed), SceneConfig(count=(8, 8)))
    shown = {p.concept for p in (*spec.placements, *spec.background.placements)}
    in_front = {p.concept for p in spec.placements}
    families = [concepts.by_name(name).family for name in in_front]
    assert len(families) == len(set(families))
    far = {concepts.by_name(name).family for name in shown - in_front}
    assert not far & set(families)


@FEW
@given(seed=SEEDS, limit=st.sampled_from((0.1, 0.25, 0.4)))
def test_nothing_is_covered_beyond_the_limit(seed: int, limit: float) -> None:
    # At the sampler's own resolution, where no safety net has taken anything out.
    config = SceneConfig(canvas=64, count=(2, 6), size=(0.1, 0.6), max_overlap=limit, text=1.0)
    rendered = render(sample_spec(np.random.default_rng(seed), config), 64)
    # Fading moves a silhouette's edge by a fraction of a pixel.
    assert min(item.visible for item in rendered.objects) >= 1.0 - limit - 0.1


def centre(rendered: Rendered, side: int) -> np.ndarray:
    left, top, right, bottom = rendered.objects[0].box
    return np.array([left + right, top + bottom]) / 2 / side


@FEW
@given(name=NAMES, x=st.floats(0.4, 0.6), y=st.floats(0.4, 0.6), size=st.floats(0.3, 0.7))
def test_one_spec_at_every_canvas_size(name: str, x: float, y: float, size: float) -> None:
    placement = Placement(concept=name, style="noto", x=x, y=y, size=size)
    spec = SceneSpec(background=PLAIN, placements=(placement,))
    small, large = render(spec, 64), render(spec, 256)
    np.testing.assert_allclose(centre(small, 64), centre(large, 256), atol=2 / 64)
    share = [r.masks[0].mean() for r in (small, large)]
    assert share[0] == pytest.approx(share[1], rel=0.25, abs=4 / 64**2)


@FEW
@given(name=NAMES, style=st.sampled_from(TRAIN_STYLES), tint=st.sampled_from(palette.TINTS))
def test_a_tinted_sprite_has_the_tints_colour(name: str, style: str, tint: str) -> None:
    found = build_sprites.shares(palette.tinted(load_sprite(name, style), tint))
    assert max(found, key=found.__getitem__) == tint


@FEW
@given(name=NAMES, flip=st.booleans())
def test_flipping_mirrors_pixels_and_facing(name: str, flip: bool) -> None:
    placement = Placement(concept=name, style="noto", x=0.5, y=0.5, size=0.8, flip=flip)
    mirrored = dataclasses.replace(placement, flip=not flip)
    one, other = (
        render(SceneSpec(background=PLAIN, placements=(p,)), 64) for p in (placement, mirrored)
    )
    difference = one.image.astype(int) - other.image[:, ::-1]
    # A sprite an odd number of pixels wide sits half a pixel off the middle.
    shifted = one.image[:, 1:].astype(int) - other.image[:, :0:-1]
    shifted_back = one.image[:, :-1].astype(int) - other.image[:, -2::-1]
    assert min(np.abs(d).mean() for d in (difference, shifted, shifted_back)) < 0.5
    opposite = {"left": "right", "right": "left", "front": "front"}
    assert facing_of(mirrored) == opposite[facing_of(placement)]


@FEW
@given(seed=SEEDS)
def test_background_colours_belong_to_no_object(seed: int) -> None:
    spec = sample_spec(np.random.default_rng(seed), SceneConfig())
    used = {colour_of(placement) for placement in spec.placements}
    assert not used & set(spec.background.colours)
    names = {p.concept for p in spec.placements if p.tint}
    assert all(can_be_tinted(concepts.by_name(name)) for name in names)


@FEW
@given(kind=st.sampled_from(BACKGROUND_KINDS), seed=st.integers(0, 2**31 - 1))
def test_a_background_looks_the_same_at_every_size(kind: str, seed: int) -> None:
    colours = ("blue",) if kind in ("flat", "collage") else ("blue", "white")
    far = Placement(concept="cat", style="noto", x=0.3, y=0.6, size=0.5)
    background = Background(
        kind=kind, colours=colours, seed=seed, placements=(far,) if kind == "collage" else ()
    )
    large = draw_background(background, (192, 288)).astype(np.float32)
    small = draw_background(background, (64, 96)).astype(np.float32)
    shrunk = large.reshape(64, 3, 96, 3, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small).mean() < 4.0
