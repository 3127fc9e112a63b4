"""Imports the published files of MOInst, or rebuilds a comparable dataset from LVIS.

    python -m launch.import_moinst published --train=MOInst_train.json --test=MOInst_test.json \
        --images=coco --out=data/moinst
    python -m launch.import_moinst lvis --lvis=lvis_v1_train.json --exclude=lvis_v1_val.json \
        --out=data/moinst_r
    python -m launch.import_moinst captions --records=data/moinst_r/objects.jsonl \
        --captions=answers.jsonl --out=data/moinst_r

Writes data for GiVE, one image per JSON line. The first argument is the step. published: imports
the published MOInst files, or foreign ones like them. lvis: the first part of MOInst-R, a
comparable set out of LVIS v1: objects, and questions for an MLLM. captions: its second part, the
MLLM's answers filtered, and the split. Numbers on MOInst-R are no numbers on MOInst.
`python -m launch.import_moinst STEP --help` shows the step's flags.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from absl import flags

from launch import common


def _define_out(values: flags.FlagValues) -> None:
    flags.DEFINE_string("out", None, "Folder of the results.", required=True, flag_values=values)


def _define_exclude(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string(
        "exclude",
        [],
        "COCO or LVIS file whose images must not be trained on, e.g. lvis_v1_val.json; any number.",
        flag_values=values,
    )


def _define_seed(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("seed", 0, "Seed of what is drawn at random.", flag_values=values)


def define_published(values: flags.FlagValues) -> None:
    """Defines the flags of the step `published`."""
    flags.DEFINE_string(
        "train", None, "The JSON file of the training part.", required=True, flag_values=values
    )
    flags.DEFINE_string("test", None, "The JSON file of the test part.", flag_values=values)
    flags.DEFINE_string(
        "categories",
        "auto",
        "Names of the category ids: auto, lvis_v1, lvis_v0.5, coco80, coco_stuff, or a JSON file.",
        flag_values=values,
    )
    flags.DEFINE_string("images", None, "Folder to look the images up in.", flag_values=values)
    flags.DEFINE_string(
        "boxes",
        None,
        "COCO or LVIS file whose annotation ids are the object ids.",
        flag_values=values,
    )
    _define_exclude(values)
    _define_out(values)


def define_lvis(values: flags.FlagValues) -> None:
    """Defines the flags of the step `lvis`."""
    flags.DEFINE_string("lvis", None, "lvis_v1_train.json.", required=True, flag_values=values)
    flags.DEFINE_integer(
        "classes", 264, "How many of the most frequent classes.", flag_values=values
    )
    flags.DEFINE_integer("count", 80_000, "How many images.", flag_values=values)
    _define_exclude(values)
    _define_seed(values)
    _define_out(values)


def define_captions(values: flags.FlagValues) -> None:
    """Defines the flags of the step `captions`."""
    flags.DEFINE_string(
        "records", None, "objects.jsonl of the step lvis.", required=True, flag_values=values
    )
    flags.DEFINE_string(
        "captions", None, "The MLLM's answers, JSON lines.", required=True, flag_values=values
    )
    flags.DEFINE_integer("test_count", 1100, "Images of the test part.", flag_values=values)
    _define_seed(values)
    _define_out(values)


PROGRAM = common.Program(
    name="import_moinst",
    define={"published": define_published, "lvis": define_lvis, "captions": define_captions},
)
"""The command line of this program."""


def run(parsed: common.Parsed) -> int:
    """Runs the step; returns 0."""
    step = {"published": _published, "lvis": _lvis, "captions": _captions}[parsed.command]
    out = pathlib.Path(parsed.flags.out)
    out.mkdir(parents=True, exist_ok=True)
    step(parsed.flags, out)
    return 0


def _published(values: flags.FlagValues, out: pathlib.Path) -> None:
    import dataclasses

    from perception_jax.data.moinst.boxes import SourceBoxes
    from perception_jax.data.moinst.published import import_published

    imported = import_published(
        pathlib.Path(values.train),
        None if values.test is None else pathlib.Path(values.test),
        categories=values.categories,
        images=None if values.images is None else pathlib.Path(values.images),
        exclude=_image_ids(values.exclude),
    )
    if values.boxes is not None:
        boxes = SourceBoxes(pathlib.Path(values.boxes))
        filled = {part: boxes.fill(images) for part, images in imported.images.items()}
        imported = dataclasses.replace(
            imported, images={part: images for part, (images, _) in filled.items()}
        )
        print("boxes found:", ", ".join(f"{part} {n:,}" for part, (_, n) in filled.items()))
    for part, rows in imported.rows.items():
        keys = ", ".join(f"{key} {count:,}" for key, count in rows.keys.items())
        print(f"{part}: keys of the rows: {keys}")
        for sample in rows.samples:
            text = json.dumps(sample, ensure_ascii=False)
            print(f"  {text.encode('utf-8', 'backslashreplace').decode()}")
    shares = "".join(f", {name} {share:.0%}" for name, share in imported.shares.items())
    print(f"class names: {imported.table}{shares}")
    for line in imported.warnings():
        print(f"warning: {line}")
    _write(out, imported.images, imported.classes, imported.report)


def _lvis(values: flags.FlagValues, out: pathlib.Path) -> None:
    from perception_jax.data.moinst import captions
    from perception_jax.data.moinst.lvis import RebuildConfig, rebuild
    from perception_jax.data.sources.fields import read_json
    from perception_jax.files import replacing

    config = RebuildConfig(classes=values.classes, images=values.count, seed=values.seed)
    if not values.exclude:
        print("warning: no images are excluded; LVIS's validation images may be among the chosen")
    built = rebuild(
        read_json(pathlib.Path(values.lvis)),
        config,
        exclude=_image_ids(values.exclude),
        where=str(values.lvis),
    )
    path = out / "questions.jsonl"
    with replacing(path) as file:
        for question in captions.questions(built.images):
            file.write(json.dumps(question, ensure_ascii=False).encode() + b"\n")
    print(f"{path}: a question for each object; the answers go to the step captions")
    report = {
        "images": len(built.images),
        "annotations": sum(len(image.objects) for image in built.images),
        "classes": len(built.classes),
        "images_eligible": built.eligible,
        "images_excluded": built.excluded,
    }
    _write(out, {"objects": built.images}, built.classes, report)


def _captions(values: flags.FlagValues, out: pathlib.Path) -> None:
    from perception_jax.data.moinst import captions, record, split

    records = pathlib.Path(values.records)
    classes = record.read_classes(records.parent / record.CLASSES_FILE)
    captioned = captions.add_captions(
        record.read_images(records), classes, captions.read_answers(pathlib.Path(values.captions))
    )
    train, test = split.stratified_split(captioned.images, values.test_count, seed=values.seed)
    parts = {"train": train, "test": test}
    counts = {f"images_{part}": len(images) for part, images in parts.items()}
    _write(out, parts, classes, {**captioned.report, **counts})


def _image_ids(paths: Iterable[str]) -> set[Any]:
    """Ids of the images of COCO or LVIS files."""
    from perception_jax.data.sources import fields

    found = set()
    for path in paths:
        content = fields.mapping(fields.read_json(path), path)
        entries = fields.required(content, "images", fields.list_of(fields.mapping), path)
        for k, entry in enumerate(entries):
            found.add(fields.required(entry, "id", fields.identity, f"{path}: images[{k}]"))
    return found


def _write(
    out: pathlib.Path, parts: Mapping[str, Any], classes: Any, report: Mapping[str, Any]
) -> None:
    from perception_jax.data.moinst import record
    from perception_jax.files import write_whole

    for part, images in parts.items():
        record.write_images(out / f"{part}.jsonl", images)
        print(f"{out / part}.jsonl: {len(images):,} images")
    record.write_classes(out / record.CLASSES_FILE, classes)
    text = json.dumps(report, indent=2)
    write_whole(out / "report.json", text + "\n")
    print(text)


if __name__ == "__main__":
    common.start(PROGRAM, run)
