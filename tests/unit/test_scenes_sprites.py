"""The packed drawings, their table of concepts, and colours."""

from __future__ import annotations

import json
import pathlib
import zipfile

import numpy as np
import pytest
from PIL import Image

from perception_jax.data.scenes import concepts, palette
from perception_jax.data.scenes.backgrounds import TONES, draw_background
from perception_jax.data.scenes.concepts import by_name, colour_of, facing_of
from perception_jax.data.scenes.render import render
from perception_jax.data.scenes.spec import STYLES, Background, DrawnText, Placement, SceneSpec
from perception_jax.data.scenes.sprites import ARCHIVE, load_sprite
from perception_jax.data.scenes.visibility import VisibilityMap
from perception_jax.errors import DataError
from tools import build_sprites

ALL = concepts.concepts()
HELD_OUT = """
    amphora, balloon, barber pole, bat, bed, bicycle, bowl of salad, bunch of cherries, bus
    stop, chain link, clamp, coffin, compact disc, crocodile, crown, deer, envelope,
    factory, ferris wheel, fountain, fox, goal net, hourglass, joystick, ladybug, lion,
    lizard, magnifying glass, monkey, pair of japanese dolls, pair of scissors, peach, pear,
    piece of sushi, pineapple, pushpin, scroll, set of control knobs, shower, slot machine,
    tangerine, telescope, television, tokyo tower, tomato, wastebasket, water wave, wolf
"""


def test_the_archive_is_small_complete_and_licensed() -> None:
    assert ARCHIVE.stat().st_size <= 5_000_000
    with zipfile.ZipFile(ARCHIVE) as archive:
        names = set(archive.namelist())
        attribution = archive.read("licences/ATTRIBUTION.txt").decode()
        assert b"Apache License" in archive.read("licences/Apache-2.0.txt")
        assert b"Microsoft Corporation" in archive.read("licences/MIT.txt")
    assert "creativecommons.org/licenses/by/4.0" in attribution
    assert all(style in attribution for style in STYLES)
    drawings = {f"{style}/{concept.name}.webp" for style in STYLES for concept in ALL}
    assert {name for name in names if not name.startswith("licences/")} == drawings


def test_there_are_enough_concepts() -> None:
    assert len(concepts.concepts(held_out=False)) >= 300
    held_out = concepts.concepts(held_out=True)
    assert len(held_out) >= 48
    assert {concept.category for concept in held_out} >= {"animal", "food", "object", "place"}
    assert {concept.category for concept in ALL} == set(concepts.CATEGORIES)
    assert all(len(concepts.family_of(concept)) == 1 for concept in held_out)


def test_held_out_concepts_stay_held_out() -> None:
    # Another choice would leak test concepts into weights that are already trained.
    frozen = " ".join(HELD_OUT.split()).split(", ")
    assert {concept.name for concept in concepts.concepts(held_out=True)} == set(frozen)


def test_every_drawing_is_tight_and_opaque_somewhere() -> None:
    for concept in ALL[::9]:
        for style in STYLES:
            sprite = load_sprite(concept.name, style)
            assert max(sprite.shape[:2]) == build_sprites.SIZE
            solid = sprite[..., 3] > 12
            edges = (solid[0], solid[-1], solid[:, 0], solid[:, -1])
            assert all(edge.any() for edge in edges), (concept.name, style)
            assert not sprite.flags.writeable


def test_pairs_point_at_each_other() -> None:
    pairs = [concept for concept in ALL if concept.counterpart]
    assert {c.view for c in pairs} == {None, "front", "side"}
    assert {c.state for c in pairs} == {None, "open", "closed"}
    for concept in pairs:
        other = by_name(concept.counterpart)
        assert other.counterpart == concept.name
        assert other.family == concept.family
        assert (other.state, other.view) != (concept.state, concept.view)


@pytest.mark.parametrize(
    ("name", "plural"),
    [
        ("pair of scissors", "pairs of scissors"),
        ("cloud with rain", "clouds with rain"),
        ("butterfly", "butterflies"),
        ("monkey", "monkeys"),
        ("church", "churches"),
        ("volcano", "volcanoes"),
        ("kimono", "kimonos"),
        ("box of popcorn", "boxes of popcorn"),
    ],
)
def test_plural(name: str, plural: str) -> None:
    assert build_sprites.plural(name) == plural
    assert by_name(name).plural == plural


def test_unknown_names_suggest_near_ones() -> None:
    with pytest.raises(DataError, match="Did you mean red apple"):
        by_name("red aple")
    with pytest.raises(DataError, match="expected a style out of noto, "):
        load_sprite("cat", "apple")


def test_damaged_archives_are_refused(tmp_path: pathlib.Path) -> None:
    whole = ARCHIVE.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"twemoji/cat.webp") + 100] ^= 0xFF
    for name, data in {"cut": whole[:-5000], "flipped": bytes(flipped), "empty": b""}.items():
        path = tmp_path / f"{name}.zip"
        path.write_bytes(data)
        with pytest.raises(DataError, match="missing or damaged"):
            load_sprite("cat", "twemoji", archive=path)
    with pytest.raises(DataError, match="missing or damaged"):
        load_sprite("cat", "twemoji", archive=tmp_path / "none.zip")


def test_an_archive_without_the_drawing_is_refused(tmp_path: pathlib.Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("noto/cat.webp", b"not an image")
    for style in ("noto", "twemoji"):
        with pytest.raises(DataError, match="none that can be decoded"):
            load_sprite("cat", style, archive=tmp_path / "a.zip")


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((255, 0, 0), "red"),
        ((0, 0, 128), "blue"),
        ((135, 206, 235), "blue"),
        ((0, 128, 0), "green"),
        ((10, 10, 10), "black"),
        ((139, 69, 19), "brown"),
        ((255, 192, 203), "pink"),
    ],
)
def test_nearest_colour(rgb: tuple[int, int, int], name: str) -> None:
    assert build_sprites.nearest_colour(rgb) == name


def test_colours_and_background_tones_are_nearest_to_their_names() -> None:
    for name in palette.NAMES:
        assert build_sprites.nearest_colour(palette.COLOURS[name]) == name
        assert build_sprites.nearest_colour(TONES[name]) == name


def test_dominating_colour_needs_half_of_the_pixels() -> None:
    sprite = np.zeros((10, 10, 4), np.uint8)
    sprite[..., 3] = 255
    sprite[:6, :, 0] = 255
    assert build_sprites.dominating_colour(sprite) == "red"
    sprite[4:6, :, :3] = 255
    assert build_sprites.dominating_colour(sprite) is None
    assert build_sprites.dominating_colour(np.zeros((4, 4, 4), np.uint8)) is None


def test_colour_and_facing_of_a_placement() -> None:
    horse = Placement(concept="horse", style="noto", x=0.5, y=0.5, size=0.5)
    change = {"concept": "horse", "style": "noto", "x": 0.5, "y": 0.5, "size": 0.5}
    assert facing_of(horse) == "left"
    assert facing_of(Placement(**change, flip=True)) == "right"
    assert facing_of(Placement(**change, angle=20.0)) == "left"
    assert facing_of(Placement(**change, angle=-21.0)) == "front"
    assert colour_of(Placement(**change, tint="blue")) == "blue"
    apple = Placement(concept="red apple", style="twemoji", x=0.5, y=0.5, size=0.5)
    assert colour_of(apple) == "red"


def test_visibility_map_counts_what_is_covered() -> None:
    visibility = VisibilityMap((4, 6))
    square, column = np.ones((2, 2), bool), np.ones((4, 1), bool)
    visibility.cover(square, (1, 1))
    assert visibility.hidden_by(square, (2, 1)) == 0.5
    assert visibility.hidden_by(square, (3, 1)) == 0.0
    visibility.cover(column, (2, 0))
    visibility.cover(square, (5, 3))
    # The square lost a column; the last one has one of its four pixels on the canvas.
    assert visibility.shares() == [0.5, 1.0, 0.25]
    visibility.cover_text(column, (2, 0))
    assert visibility.shares() == [0.5, 0.0, 0.25]
    assert visibility.masks().sum(axis=(1, 2)).tolist() == [2, 0, 1]


def test_text_covers_what_is_under_it() -> None:
    placement = Placement(concept="heart suit", style="noto", x=0.5, y=0.5, size=0.9)
    word = DrawnText(text="hello", x=0.5, y=0.5, size=0.2, colour="black")
    background = Background(kind="flat", colours=("grey",), seed=0)
    bare = render(SceneSpec(background=background, placements=(placement,)), 128)
    written = render(SceneSpec(background=background, placements=(placement,), text=word), 128)
    assert bare.objects[0].visible == 1.0
    assert 0.6 < written.objects[0].visible < 0.95
    hidden = bare.masks[0] & ~written.masks[0]
    changed = (bare.image != written.image).any(axis=-1)
    assert changed[hidden].mean() > 0.95


def test_a_placement_outside_the_canvas_is_not_visible() -> None:
    placement = Placement(concept="cat", style="noto", x=-1.0, y=0.5, size=0.3)
    background = Background(kind="flat", colours=("grey",), seed=0)
    (item,) = render(SceneSpec(background=background, placements=(placement,)), 64).objects
    assert item.visible == 0.0
    assert item.box[0] == item.box[2]


def test_wrong_backgrounds_and_canvases_are_refused() -> None:
    with pytest.raises(DataError, match="found 'teal'"):
        draw_background(Background(kind="flat", colours=("teal",), seed=0), (8, 8))
    spec = SceneSpec(background=Background(kind="flat", colours=("red",), seed=0), placements=())
    with pytest.raises(DataError, match="at least 1 × 1"):
        render(spec, 0)


def test_trimming_keeps_the_opaque_part() -> None:
    image = Image.new("RGBA", (40, 40))
    image.paste((255, 0, 0, 255), (10, 5, 20, 25))
    trimmed = build_sprites.trimmed(image)
    assert trimmed.size == (48, 96)
    assert np.asarray(trimmed)[48, 24].tolist() == [255, 0, 0, 255]


def test_packing_is_deterministic() -> None:
    sprites = {"noto/b.webp": b"2", "noto/a.webp": b"1"}
    packed = build_sprites.pack(sprites)
    assert packed == build_sprites.pack(dict(reversed(sprites.items())))


def test_curation_of_unknown_icons_is_refused() -> None:
    table = {key: {} for key in ("dropped", "categories", "kin", "facing", "names", "plurals")}
    table |= {"counterparts": {"state": [["door", "dor"]]}}
    with pytest.raises(DataError, match=r"\['dor'\]"):
        build_sprites.check_icons(table, ["door"])


def test_the_table_is_what_json_says() -> None:
    rows = json.loads((ARCHIVE.parent / "concepts.json").read_text())["concepts"]
    assert [row["name"] for row in rows] == sorted(concept.name for concept in ALL)
