"""The embedded world: scenes of real emoji drawings, from a seed, with everything known about them.

    source = ScenesSource(SceneConfig(canvas=128, split="train"), seed=0, length=10_000)
    record = source[0]

`spec` says what a scene is; `sample` draws one at random, `render` turns it into pixels, boxes and
masks, `language` into words, `pairs` edits it in one respect. Four artists' drawings train; the
fifth's, and the held-out concepts, only test. Licences of the drawings: `assets/licences`.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "Concept": "concepts",
    "concepts": "concepts",
    "SceneConfig": "sample",
    "ScenesSource": "source",
    "portrait": "source",
    "render": "render",
    "contact_sheet": "sheet",
}
