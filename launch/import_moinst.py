"""Makes canonical records of MOInst's published files, or rebuilds a comparable set from LVIS.

python -m launch.import_moinst published --train=MOInst_train.json --test=MOInst_test.json \
    --out=data/moinst
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from launch import common
from launch.flags_of import check_flags

FLAGS_OF = {
    "published": ("train", "test", "categories", "images", "boxes", "exclude"),
    "lvis": ("lvis", "exclude", "classes", "count", "seed"),
    "captions": ("records", "captions", "test_count", "seed"),
}
"""Which flags each step takes, besides --out."""
REQUIRED = {"published": ("train",), "lvis": ("lvis",), "captions": ("records", "captions")}

PROGRAM = common.Program(
    name="import_moinst",
    description=(
        "Writes data for GiVE as canonical records, one image per JSON line. published: imports "
        "the published MOInst files, or foreign ones like them. lvis: the first part of MOInst-R, "
        "a comparable set out of LVIS v1: objects, and questions for an MLLM. captions: its second "
        "part, the MLLM's answers filtered, and the split. Numbers on MOInst-R are no numbers on "
        "MOInst."
    ),
    config="none",
    positional=(common.Argument("STEP", "What to do.", choices=tuple(FLAGS_OF)),),
    flags=(
        common.Flag("train", pathlib.Path, help="published: the JSON file of the training part."),
        common.Flag("test", pathlib.Path, help="published: the JSON file of the test part."),
        common.Flag(
            "categories",
            default="auto",
            help="published: names of the category ids: auto, lvis_v1, lvis_v0.5, coco80, "
            "coco_stuff, or a JSON file.",
        ),
        common.Flag("images", pathlib.Path, help="published: folder to look the images up in."),
        common.Flag(
            "boxes",
            pathlib.Path,
            help="published: COCO or LVIS file whose annotation ids are the object ids.",
        ),
        common.Flag("lvis", pathlib.Path, help="lvis: lvis_v1_train.json."),
        common.Flag(
            "exclude",
            default=(),
            repeated=True,
            help="published, lvis: COCO or LVIS file whose images must not be trained on, e.g. "
            "lvis_v1_val.json.",
        ),
        common.Flag("classes", int, 264, "lvis: how many of the most frequent classes."),
        common.Flag("count", int, 80_000, "lvis: how many images."),
        common.Flag("records", pathlib.Path, help="captions: objects.jsonl of the step lvis."),
        common.Flag("captions", pathlib.Path, help="captions: the MLLM's answers, JSON lines."),
        common.Flag("test_count", int, 1100, "captions: images of the test part."),
        common.Flag("seed", int, 0, "lvis, captions: of what is drawn at random."),
        common.Flag("out", pathlib.Path, help="Folder for the results.", required=True),
    ),
    examples=(
        "python -m launch.import_moinst published --train=MOInst_train.json "
        "--test=MOInst_test.json --images=coco --out=data/moinst",
        "python -m launch.import_moinst lvis --lvis=lvis_v1_train.json "
        "--exclude=lvis_v1_val.json --out=data/moinst_r",
        "python -m launch.import_moinst captions --records=data/moinst_r/objects.jsonl "
        "--captions=answers.jsonl --out=data/moinst_r",
    ),
)


def run(parsed: common.Parsed) -> int:
    """Runs the step; returns 0."""
    step, flags = parsed.positional["STEP"], parsed.flags
    _check(step, flags)
    flags["out"].mkdir(parents=True, exist_ok=True)
    _STEPS[step](flags)
    return 0


def _check(step: str, flags: Mapping[str, Any]) -> None:
    from perception_jax.errors import ConfigError

    for name in REQUIRED[step]:
        if flags[name] is None:
            raise ConfigError(f"{step}: --{name} is missing.")
    check_flags(PROGRAM, step, flags, FLAGS_OF)


def _published(flags: Mapping[str, Any]) -> None:
    import dataclasses

    from perception_jax.data.moinst.boxes import SourceBoxes
    from perception_jax.data.moinst.published import import_published

    imported = import_published(
        flags["train"],
        flags["test"],
        categories=flags["categories"],
        images=flags["images"],
        exclude=_image_ids(flags["exclude"]),
    )
    if flags["boxes"] is not None:
        boxes = SourceBoxes(flags["boxes"])
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
    _write(flags["out"], imported.images, imported.classes, imported.report)


def _lvis(flags: Mapping[str, Any]) -> None:
    from perception_jax.data.moinst import captions
    from perception_jax.data.moinst.lvis import RebuildConfig, rebuild
    from perception_jax.data.sources.fields import read_json
    from perception_jax.files import replacing

    config = RebuildConfig(classes=flags["classes"], images=flags["count"], seed=flags["seed"])
    if not flags["exclude"]:
        print("warning: no images are excluded; LVIS's validation images may be among the chosen")
    built = rebuild(
        read_json(flags["lvis"]),
        config,
        exclude=_image_ids(flags["exclude"]),
        where=str(flags["lvis"]),
    )
    path = flags["out"] / "questions.jsonl"
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
    _write(flags["out"], {"objects": built.images}, built.classes, report)


def _captions(flags: Mapping[str, Any]) -> None:
    from perception_jax.data.moinst import captions, record, split

    classes = record.read_classes(flags["records"].parent / record.CLASSES_FILE)
    captioned = captions.add_captions(
        record.read_images(flags["records"]), classes, captions.read_answers(flags["captions"])
    )
    train, test = split.stratified_split(captioned.images, flags["test_count"], seed=flags["seed"])
    parts = {"train": train, "test": test}
    counts = {f"images_{part}": len(images) for part, images in parts.items()}
    _write(flags["out"], parts, classes, {**captioned.report, **counts})


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


_STEPS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "published": _published,
    "lvis": _lvis,
    "captions": _captions,
}


if __name__ == "__main__":
    sys.exit(common.main(PROGRAM, run))
