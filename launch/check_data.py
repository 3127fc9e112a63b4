"""Draws what a config's model will see, beside the records that it comes from, on one page.

python -m launch.check_data --config=configs/clip/scenes.py --out=runs/check_data.html
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

from launch import common

PROGRAM = common.Program(
    name="check_data",
    description=(
        "Takes records from the config's training data, runs the config's transform on them, and "
        "writes one self-contained HTML page: the record (image, boxes, texts) and the arrays "
        "that the model gets, boxes and tokens turned back into pictures and words. Records that "
        "cannot be used are named."
    ),
    flags=(
        common.Flag("out", pathlib.Path, pathlib.Path("check_data.html"), "The page to write."),
        common.Flag("count", int, 16, "How many records."),
        common.Flag("seed", int, 0, "Chooses the records, and what the transform draws."),
    ),
    examples=(
        "python -m launch.check_data --config=configs/clip/scenes.py",
        "python -m launch.check_data --config=configs/clip/scenes.py --config.data.source=DIR",
    ),
)


def run(parsed: common.Parsed) -> int:
    """Writes the page and prints a summary; 1 if none of the records can be used."""
    import numpy as np

    from launch.data_page import add_record
    from perception_jax.errors import ConfigError, DataError
    from perception_jax.viz.report import Report

    count, seed = parsed.flags["count"], parsed.flags["seed"]
    if count < 1:
        raise ConfigError(f"--count: expected at least 1, found {count}.")
    task = _get_task(parsed)
    examples = task.examples(seed)
    report = Report("Data check", f"`{parsed.config_path}`, {len(examples):,} records")
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(examples), min(count, len(examples)), replace=False).tolist()
    bad = []
    for index in chosen:
        try:
            record, example = examples[index]
        except DataError as error:
            bad.append((index, str(error)))
            continue
        add_record(report, record, example, getattr(task, "tokenizer", None))
    if bad:
        report.add_section("Not usable", "Training skips these.")
        report.add_table(("record", "reason"), [(str(index), reason) for index, reason in bad])
    report.add_details(parsed.config.to_dict())
    path = report.write(parsed.flags["out"])
    print(f"{len(chosen) - len(bad)} of {len(chosen)} records usable; page: {path}")
    for index, reason in bad:
        print(f"record number {index}: {reason}")
    return int(len(bad) == len(chosen))


def _get_task(parsed: common.Parsed) -> Any:
    from perception_jax.errors import ConfigError

    if not hasattr(parsed.module, "get_task"):
        raise ConfigError(f"{parsed.config_path}: expected get_task(config), found none.")
    task = parsed.module.get_task(parsed.config)
    if not hasattr(task, "examples"):
        raise ConfigError(
            f"{parsed.config_path}: its {type(task).__name__} has no `examples`: expected "
            "examples(seed), records with their arrays (see perception_jax.data.loader.Examples)."
        )
    return task


if __name__ == "__main__":
    sys.exit(common.main(PROGRAM, run))
