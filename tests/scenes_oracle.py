"""Judges what is said of a scene, without the library's own facts.

Phrases are parsed back by regular expressions into plain predicates, which are evaluated on boxes,
spec and concept table. The predicates are crisp and lenient ("left" is any x below one half) and a
thing of unknown colour or facing fits every colour or facing; so what passes here is true, and
unique among all things that it could mean.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re
from collections.abc import Callable, Sequence

from perception_jax.data.records import Question
from perception_jax.data.scenes.spec import RenderedObject, SceneSpec

_FILE = importlib.resources.files("perception_jax.data.scenes") / "assets" / "concepts.json"
TABLE = {row["name"]: row for row in json.loads(_FILE.read_text(encoding="utf-8"))["concepts"]}
SINGULAR = {row["plural"]: row["name"] for row in TABLE.values()}
CATEGORY_NOUNS = {"animals": "animal", "plants": "plant", "vehicles": "vehicle"}
CATEGORY_WORDS = {
    "an animal": "animal",
    "a plant": "plant",
    "a vehicle": "vehicle",
    "something to eat or drink": "food",
}
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight"]
RANKS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]
EXTREMES = {"leftmost": "left", "rightmost": "right", "topmost": "top", "bottommost": "bottom"}
COLOURS = "red|orange|yellow|green|blue|purple|pink|brown|black|grey|white"
SIZES = [("tiny", 0.1), ("small", 0.22), ("medium-sized", 0.45), ("large", 0.7), ("huge", 9.0)]


def _any_of(words: Sequence[str]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


NAMES, PLURALS = _any_of(list(TABLE)), _any_of(list(SINGULAR))
PLACE = r"on the (?:left|right)|at the (?:top|bottom)(?: (?:left|right))?|in the middle"
RELATION = "to the left of|to the right of|above|below"
REFERENCE = re.compile(
    rf"the (?:(?P<before>{COLOURS}|bigger|smaller|biggest|smallest|{'|'.join(EXTREMES)}|"
    rf"{'|'.join(RANKS)}) )?(?P<noun>{NAMES}|animal|plant|vehicle|thing|one)"
    rf"(?: facing (?P<facing>left|right))?(?: (?P<place>{PLACE}))?"
    rf"(?: (?P<relation>{RELATION}) the (?P<anchor>{NAMES}))?"
    r"(?: from the (?P<start>left|right|top|bottom))?"
)
_TAIL = rf"(?: facing (?P<facing>left|right))?(?: (?P<place>{PLACE}))?"
ITEM = re.compile(
    rf"\ban? (?:(?P<size>tiny|small|medium-sized|large|huge) )?(?:(?P<colour>{COLOURS}) )?"
    rf"(?P<noun>{NAMES}|animal|plant|vehicle)\b{_TAIL}"
)
SOMETHING = re.compile(
    r"\bsomething(?: (?P<size>tiny|small|medium-sized|large|huge)\b)?"
    rf"(?: (?:and )?(?P<colour>{COLOURS})\b)?{_TAIL}"
)
COUNTED = re.compile(
    rf"\b(?P<number>{'|'.join(NUMBERS[2:])}) (?P<noun>{PLURALS}|animals|plants|vehicles|things)\b"
)
BACKDROP = re.compile(
    rf"\ban? (?:(?P<flat>plain|busy) (?P<one>{COLOURS}) background|"
    rf"background that fades from (?P<from>{COLOURS}) to (?P<to>{COLOURS})|"
    rf"(?P<kind>blotchy|patterned) (?P<a>{COLOURS}) and (?P<b>{COLOURS}) background)"
)
_LIST = r"(?:[§#]|[§#](?:, [§#])* and (?:[§#]|other things))"
SKELETON = re.compile(
    rf"(?:an? (?:photo|picture|drawing|image) of )?(?:{_LIST}|§ (?:{RELATION}) §|~)"
    rf'(?: (?:on|of) ~)?(?:, with the word "(?P<word>\w+)" in (?P<ink>{COLOURS}) letters)?'
)
KINDS = {"plain": "flat", "busy": "collage", "blotchy": "noise", "patterned": "texture"}


@dataclasses.dataclass(frozen=True)
class Thing:
    """A visible object, from its placement, its box and the concept table alone."""

    name: str
    kin: str
    category: str
    colour: str | None
    facing: str | None
    x: float
    y: float
    side: float
    opacity: float
    angle: float

    def fits_place(self, place: str) -> bool:
        """`place`: "on the left", "at the top right", "in the middle"."""
        if place == "in the middle":
            return max(abs(self.x - 0.5), abs(self.y - 0.5)) < 0.15
        inside = {
            "left": self.x < 0.5,
            "right": self.x > 0.5,
            "top": self.y < 0.5,
            "bottom": self.y > 0.5,
        }
        return all(inside[word] for word in place.split() if word in inside)

    def stands(self, relation: str, other: Thing) -> bool:
        """`relation`: "to the left of", "above", ..."""
        return {
            "to the left of": self.x < other.x,
            "to the right of": self.x > other.x,
            "above": self.y < other.y,
            "below": self.y > other.y,
        }[relation]

    @property
    def size(self) -> str:
        return next(word for word, limit in SIZES if self.side < limit)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A spec and its visible things, in the order of the record's objects."""

    spec: SceneSpec
    things: tuple[Thing, ...]

    @property
    def faint(self) -> list[str]:
        """Kin of the collage's far things."""
        return [TABLE[p.concept]["kin"] for p in self.spec.background.placements]


def scene_of(spec: SceneSpec, objects: Sequence[RenderedObject], canvas: tuple[int, int]) -> Scene:
    """All `objects`, taken as visible."""
    return Scene(spec, tuple(_thing(item, *canvas) for item in objects))


def _thing(item: RenderedObject, height: int, width: int) -> Thing:
    placement, row = item.placement, TABLE[item.placement.concept]
    facing = row["facing"] if row["facing"] != "front" and abs(placement.angle) <= 20 else None
    if facing and placement.flip:
        facing = {"left": "right", "right": "left"}[facing]
    x0, y0, x1, y1 = item.box
    return Thing(
        name=placement.concept,
        kin=row["kin"],
        category=row["category"],
        colour=placement.tint or row["colours"].get(placement.style),
        facing=facing,
        x=(x0 + x1) / 2 / width,
        y=(y0 + y1) / 2 / height,
        side=max(x1 - x0, y1 - y0) / min(height, width),
        opacity=placement.opacity,
        angle=placement.angle,
    )


def meant_by(phrase: str, scene: Scene) -> list[int]:
    """The things that a reference could mean; `[k]` for a good one."""
    match = REFERENCE.fullmatch(phrase)
    assert match, f"cannot parse {phrase!r}"
    part = match.groupdict()
    noun = part["noun"]
    if noun in TABLE:
        assert TABLE[noun]["kin"] not in scene.faint, f"{phrase!r}: a far one is in the collage"
        named = [k for k, t in enumerate(scene.things) if t.kin == TABLE[noun]["kin"]]
    else:
        assert not scene.faint, f"{phrase!r}: far things are in the collage"
        anything = noun in ("thing", "one")
        named = [k for k, t in enumerate(scene.things) if anything or t.category == noun]
    left = [k for k in named if _has_modifiers(scene, scene.things[k], part)]
    if part["before"] in RANKS or part["before"] in EXTREMES or part["before"] in SUPERLATIVES:
        assert left == named, f"{phrase!r}: a rank with other modifiers"
        return [_ranked(scene, named, part["before"], part["start"])]
    return left


def _has_modifiers(scene: Scene, thing: Thing, part: dict[str, str | None]) -> bool:
    if part["before"] in COLOURS.split("|") and thing.colour not in (part["before"], None):
        return False
    if part["facing"] and thing.facing not in (part["facing"], None):
        return False
    if part["place"] and not thing.fits_place(part["place"]):
        return False
    if part["relation"]:
        (anchor,) = (t for t in scene.things if t.kin == TABLE[part["anchor"]]["kin"])
        return thing is not anchor and thing.stands(part["relation"], anchor)
    return True


SUPERLATIVES = ("bigger", "smaller", "biggest", "smallest")


def _ranked(scene: Scene, named: list[int], word: str, start: str | None) -> int:
    things = scene.things
    if word in SUPERLATIVES:
        assert (len(named) == 2) == (not word.endswith("est")), f"{word} of {len(named)}"
        pick = max if word.startswith("big") else min
        return pick(named, key=lambda k: things[k].side)
    assert len(named) > 2, f"{word} of {len(named)}"
    start = start or EXTREMES[word]
    along: Callable[[int], float] = lambda k: (  # noqa: E731
        things[k].x if start in ("left", "right") else things[k].y
    )
    row = sorted(named, key=along, reverse=start in ("right", "bottom"))
    return row[RANKS.index(word) if word in RANKS else 0]


def check_caption(text: str, scene: Scene) -> None:
    """Asserts that every part of a scene's caption is true."""
    items: list[re.Match[str]] = []

    def keep(mark: str) -> Callable[[re.Match[str]], str]:
        def replace(match: re.Match[str]) -> str:
            items.append(match)
            return mark

        return replace

    rest = BACKDROP.sub(keep("~"), text)
    rest = COUNTED.sub(keep("#"), rest)
    rest = SOMETHING.sub(keep("§"), ITEM.sub(keep("§"), rest))
    skeleton = SKELETON.fullmatch(rest)
    assert skeleton, f"cannot parse {text!r}: {rest!r}"
    if word := skeleton["word"]:
        assert scene.spec.text, text
        assert (word, skeleton["ink"]) == (scene.spec.text.text, scene.spec.text.colour), text
    described = [m.groupdict() for m in items if m.re in (ITEM, SOMETHING)]
    for match in items:
        if match.re is BACKDROP:
            assert _backdrop_holds(match, scene), text
        elif match.re is COUNTED:
            assert _count(match["noun"], scene) == NUMBERS.index(match["number"]), text
        else:
            assert any(fits(thing, match.groupdict()) for thing in scene.things), text
    if relation := re.search(rf"§ ({RELATION}) §", rest):
        pairs = [(a, b) for a in scene.things for b in scene.things if a is not b]
        first, second = described
        assert any(
            fits(a, first) and fits(b, second) and a.stands(relation[1], b) for a, b in pairs
        ), text


def check_object_caption(text: str, thing: Thing) -> None:
    """Asserts that a caption is true of the thing."""
    body = re.sub(r" (?:of|in) the picture$", "", text)
    match = ITEM.fullmatch(body) or SOMETHING.fullmatch(body)
    assert match, f"cannot parse {text!r}"
    assert fits(thing, match.groupdict()), text


def fits(thing: Thing, part: dict[str, str | None]) -> bool:
    """Whether a noun phrase's parts are all true of the thing."""
    noun = part.get("noun")
    if f"{part['size']} {noun}" in TABLE:
        return fits(thing, {**part, "size": None, "noun": f"{part['size']} {noun}"})
    return (
        (noun is None or noun in (thing.name, thing.category))
        and part["size"] in (None, thing.size)
        and part["colour"] in (None, thing.colour)
        and part["facing"] in (None, thing.facing)
        and (part["place"] is None or thing.fits_place(part["place"]))
    )


def _backdrop_holds(match: re.Match[str], scene: Scene) -> bool:
    background, part = scene.spec.background, match.groupdict()
    kind = KINDS.get(part["flat"] or part["kind"], "gradient")
    said = tuple(part[key] for key in ("one", "from", "to", "a", "b") if part[key])
    return (kind, said) == (background.kind, background.colours)


def _count(plural: str, scene: Scene) -> int:
    if plural == "things":
        assert not scene.faint
        return len(scene.things)
    if plural in CATEGORY_NOUNS:
        assert not any(
            row["category"] == CATEGORY_NOUNS[plural] and row["kin"] in scene.faint
            for row in TABLE.values()
        )
        return sum(t.category == CATEGORY_NOUNS[plural] for t in scene.things)
    row = TABLE[SINGULAR[plural]]
    assert row["kin"] not in scene.faint
    return sum(t.kin == row["kin"] for t in scene.things)


def _meant(phrase: str, scene: Scene) -> Thing:
    (k,) = meant_by(phrase, scene)
    return scene.things[k]


def _presence(match: re.Match[str], scene: Scene) -> str:
    kin = TABLE[match[1]]["kin"]
    if any(t.name == match[1] for t in scene.things):
        return "yes"
    assert kin not in [*scene.faint, *(t.kin for t in scene.things)]
    return "no"


def _which(match: re.Match[str], scene: Scene) -> str:
    things = [_meant(match[k], scene) for k in (2, 3)]
    larger = match[2] if things[0].side > things[1].side else match[3]
    return larger if (match[1] == "bigger") else {match[2]: match[3], match[3]: match[2]}[larger]


def _is_written(match: re.Match[str], scene: Scene) -> str:
    return "yes" if scene.spec.text and scene.spec.text.text == match[1] else "no"


def _kind(match: re.Match[str], scene: Scene) -> str:
    phrase = "the thing" if match[1] == "shown" else match[1].replace(" one", " thing", 1)
    category = _meant(phrase, scene).category
    return next(words for words, name in CATEGORY_WORDS.items() if name == category)


def _side(thing: Thing, sides: Sequence[str]) -> str:
    return next(side for side in sides if thing.fits_place(side))


def _ordered(match: re.Match[str], scene: Scene, words: dict[str, str]) -> str:
    first, second = _meant(match[1], scene), _meant(match[2], scene)
    return next(word for word, relation in words.items() if first.stands(relation, second))


_SIDEWAYS = {"left": "to the left of", "right": "to the right of"}
_UPRIGHT = {"above": "above", "below": "below"}
_ANSWERS: tuple[tuple[str, Callable[[re.Match[str], Scene], str]], ...] = (
    (rf"(?:Is there|Can you see) an? ({NAMES}) in the picture\?", _presence),
    (rf"Does the picture show an? ({NAMES})\?", _presence),
    (r"How many (.+) are there in the picture\?", lambda m, s: str(_count(m[1], s))),
    (r"What colour is (.+)\?", lambda m, s: str(_meant(m[1], s).colour)),
    (r"Which is (bigger|smaller), (.+) or (.+)\?", _which),
    (
        r"Is (.+) bigger or smaller than (.+)\?",
        lambda m, s: "bigger" if _meant(m[1], s).side > _meant(m[2], s).side else "smaller",
    ),
    (
        r"Is (.+) on the left or on the right of the picture\?",
        lambda m, s: _side(_meant(m[1], s), ("left", "right")),
    ),
    (
        r"Is (.+) at the top or at the bottom of the picture\?",
        lambda m, s: _side(_meant(m[1], s), ("top", "bottom")),
    ),
    (r"Is (.+) to the left or to the right of (.+)\?", lambda m, s: _ordered(m, s, _SIDEWAYS)),
    (r"Is (.+) above or below (.+)\?", lambda m, s: _ordered(m, s, _UPRIGHT)),
    (
        r"Is (.+) facing (left|right)\?",
        lambda m, s: "yes" if _meant(m[1], s).facing == m[2] else "no",
    ),
    (r"Which way is (.+) facing\?", lambda m, s: str(_meant(m[1], s).facing)),
    (r"What word is written in the picture\?", lambda m, s: s.spec.text.text),
    (r'Is the word "(\w+)" written in the picture\?', _is_written),
    (r"What kind of thing is (.+)\?", _kind),
    (r"What is shown\?", lambda m, s: _meant("the thing", s).name),
    (r"What is (.+)\?", lambda m, s: _meant(m[1], s).name),
)


def check_question(question: Question, scene: Scene) -> None:
    """Asserts that the answer is right, and that it is the only right option."""
    found = ((re.fullmatch(form, question.text), answer) for form, answer in _ANSWERS)
    match, answer = next((m, a) for m, a in found if m)
    assert answer(match, scene) == question.answer, question
    if question.options:
        assert len(set(question.options)) == 2, question
        assert question.answer in question.options, question


def says(statement: str, scene: Scene) -> bool:
    """Whether a minimal pair's statement is true of a scene."""
    for form, holds in _STATEMENTS:
        if match := re.fullmatch(form, statement):
            return holds(match, scene)
    raise AssertionError(f"cannot parse {statement!r}")


def _some(scene: Scene, name: str, holds: Callable[[Thing], bool]) -> bool:
    return any(thing.name == name and holds(thing) for thing in scene.things)


def _views(match: re.Match[str], scene: Scene) -> bool:
    front = TABLE[match[1]]["counterpart"]
    return _some(scene, front if match[2] == "front" else match[1], lambda thing: True)


def _arranged(match: re.Match[str], scene: Scene) -> bool:
    group = [thing for thing in scene.things if thing.name == SINGULAR[match[2]]]
    if len(group) != NUMBERS.index(match[1]):
        return False
    wide, tall = (
        max(values) - min(values) for values in ([t.x for t in group], [t.y for t in group])
    )
    if match[3] == "in a circle":
        return min(wide, tall) > 0.4
    return (wide > 0.6 and tall < 0.1) if match[3] == "side by side" else tall > 0.6 > 6 * wide


_A = rf"an? ({NAMES})"
_STATEMENTS: tuple[tuple[str, Callable[[re.Match[str], Scene], bool]], ...] = (
    (rf"{_A} facing (left|right)", lambda m, s: _some(s, m[1], lambda t: t.facing == m[2])),
    (rf"a scene with {_A}", lambda m, s: _some(s, m[1], lambda t: True)),
    (
        rf"a scene without {_A}",
        lambda m, s: all(t.kin != TABLE[m[1]]["kin"] for t in s.things),
    ),
    (
        rf"an? (solid|faded) ({NAMES})",
        lambda m, s: _some(s, m[2], lambda t: (t.opacity < 0.8) == (m[1] == "faded")),
    ),
    (
        rf"{_A} (the right way up|upside down)",
        lambda m, s: _some(s, m[1], lambda t: (abs(t.angle) == 180) == (m[2] == "upside down")),
    ),
    (
        rf"({'|'.join(NUMBERS[2:])}) ({PLURALS})",
        lambda m, s: _count(m[2], s) == NUMBERS.index(m[1]),
    ),
    (
        rf"{_A} ({RELATION}) {_A}",
        lambda m, s: any(
            a.name == m[1] and b.name == m[3] and a.stands(m[2], b)
            for a in s.things
            for b in s.things
        ),
    ),
    (rf"{_A} ({PLACE})", lambda m, s: _some(s, m[1], lambda t: t.fits_place(m[2]))),
    (rf"an? ({COLOURS}) ({NAMES})", lambda m, s: _some(s, m[2], lambda t: t.colour == m[1])),
    (
        rf"({'|'.join(NUMBERS[2:])}) ({PLURALS}) (side by side|one above another|in a circle)",
        _arranged,
    ),
    (r'the word "(\w+)"', lambda m, s: bool(s.spec.text) and s.spec.text.text == m[1]),
    (
        rf"{_A} (close up|far away)",
        lambda m, s: _some(s, m[1], lambda t: (t.side > 0.6) == (m[2] == "close up")),
    ),
    (rf"{_A} seen from the (side|front)", _views),
    (_A, lambda m, s: sum(t.name == m[1] for t in s.things) == 1),
)
