"""Golden checks of the imports that make canonical MOInst records."""

from __future__ import annotations

import json
import pathlib
import tempfile
from typing import Any

import pytest

from perception_jax.data.moinst.lvis import RebuildConfig, rebuild
from perception_jax.data.moinst.published import import_published
from perception_jax.data.moinst.record import MoinstImage, from_json, to_json
from perception_jax.errors import DataError
from tests.parity.cases import Case, check


@check("give", when=lambda case: case.name.startswith("moinst_import"))
def published_files(case: Case) -> None:
    share = float(case.settings["max_bad_share"])
    for given in case.settings["imports"]:
        with tempfile.TemporaryDirectory() as folder:
            _published(case, given, pathlib.Path(folder), share)
    for given in case.settings["failures"]:
        with pytest.raises(DataError) as caught:
            import_published(
                case.directory / given["train"],
                categories=_categories(case, given["categories"]),
                max_bad_share=share,
            )
        for word in given["must_mention"]:
            assert word.lower() in str(caught.value).lower(), given["reason"]


def _published(case: Case, given: dict[str, Any], folder: pathlib.Path, share: float) -> None:
    if given["root_files"] is not None:
        for name in json.loads((case.directory / given["root_files"]).read_text()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    imported = import_published(
        case.directory / given["train"],
        case.directory / given["test"],
        categories=_categories(case, given["categories"]),
        images=None if given["root_files"] is None else folder,
        max_bad_share=share,
    )
    for part in ("train", "test"):
        _assert_records(imported.images[part], case.directory / given[f"expected_{part}"])
    expected = json.loads((case.directory / given["expected_report"]).read_text())
    assert imported.report == expected, given["name"]


def _categories(case: Case, name: str) -> str:
    return str(case.directory / name) if name.endswith(".json") else name


@check("give", when=lambda case: case.name.startswith("lvis_import"))
def lvis_file(case: Case) -> None:
    settings = case.settings
    config = RebuildConfig(
        classes=settings["num_classes"],
        images=settings["num_images"],
        objects=settings["max_objects"],
        min_area_share=float(settings["min_area_share"]),
        min_side=float(settings["min_side_px"]),
        seed=settings["sampling_seed"],
    )
    content = json.loads((case.directory / settings["input"]).read_text())
    built = rebuild(content, config)
    assert built.eligible == settings["num_eligible_images"]
    expected = json.loads((case.directory / settings["expected_classes"]).read_text())
    names = {"class": "name"}
    for ours, theirs in zip(built.classes, expected, strict=True):
        assert {key: getattr(ours, names.get(key, key)) for key in theirs} == theirs
    _assert_records(built.images, case.directory / settings["expected"])
    # Neither the order of the file's lists nor that of its ids decides anything.
    content["images"].reverse()
    content["annotations"].reverse()
    content["categories"].reverse()
    again = rebuild(content, config)
    assert (again.images, again.classes) == (built.images, built.classes)


def _assert_records(images: tuple[MoinstImage, ...], expected: pathlib.Path) -> None:
    lines = [json.loads(line) for line in expected.read_text().splitlines()]
    assert [to_json(image) for image in images] == lines
    assert [from_json(line, expected.name) for line in lines] == list(images)
