"""Draws the model's inputs of a config next to their records, on one page.

    python -m launch.check_data --config=configs/clip/scenes.py --out=runs/check_data.html
    python -m launch.check_data --config=configs/clip/scenes.py --config.data.source=DIR

Takes records from the config's training data, runs the config's transform on them, and writes one
self-contained HTML page: the record (image, boxes, texts) and the arrays that the model gets, boxes
and tokens turned back into pictures and words. Records that cannot be used are named. No weights
are read.
"""

from __future__ import annotations

import pathlib

from absl import flags

from launch import common


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    flags.DEFINE_string("out", "check_data.html", "The page to write.", flag_values=values)
    flags.DEFINE_integer("count", 16, "How many records.", flag_values=values)
    flags.DEFINE_integer(
        "seed", 0, "Chooses the records, and what the transform draws.", flag_values=values
    )


PROGRAM = common.Program(name="check_data", define=define_flags, config=True)
"""The command line of this program."""


def run(parsed: common.Parsed) -> int:
    """Writes the page and prints a summary; 1 if none of the records can be used."""
    import numpy as np

    from launch.data_page import add_record
    from launch.systems import training_program
    from perception_jax.errors import ConfigError, DataError
    from perception_jax.viz.html_report import Report

    count, seed = parsed.flags.count, parsed.flags.seed
    if count < 1:
        raise ConfigError(f"--count: expected at least 1, found {count}.")
    data = training_program(parsed.config).data(parsed.config)
    examples = data.examples(seed)
    report = Report("Data check", f"`{parsed.config_path}`, {examples.record_count:,} records")
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(examples), min(count, len(examples)), replace=False).tolist()
    bad = []
    for index in chosen:
        try:
            record, example = examples[index]
        except DataError as error:
            bad.append((index, str(error)))
            continue
        add_record(report, record, example, data.tokenizer)
    if bad:
        report.add_section("Not usable", "Training skips these.")
        report.add_table(("record", "reason"), [(str(index), reason) for index, reason in bad])
    report.add_details(parsed.config.to_dict())
    path = report.write(pathlib.Path(parsed.flags.out))
    print(f"{len(chosen) - len(bad)} of {len(chosen)} records usable; page: {path}")
    for index, reason in bad:
        print(f"record number {index}: {reason}")
    return int(len(bad) == len(chosen))


if __name__ == "__main__":
    common.start(PROGRAM, run)
