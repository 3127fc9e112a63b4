"""Compiles the training steps of `docs/scale.md` for TPU slices and prints its tables.

    python tests/bench/scale.py plans            # the configs that ship; --only=clip for some
    python tests/bench/scale.py scaling          # one model on 16, 64 and 256 chips

Every row is one command of `launch.plan`, printed before it runs. Needs libtpu (`make tpu`), up to
8 GB of memory and minutes for each row. Nothing runs on a TPU.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
LARGE = "v5e-256,v5p-128,v6e-256"
PLANS = [
    ("configs/clip/vit_b16.py", LARGE),
    ("configs/clip/vit_l14_336.py", LARGE),
    ("configs/siglip/so400m14_384.py", LARGE),
    *(
        (f"configs/give/{name}.py", "v5e-16,v5e-256")
        for name in ("clip_b16", "clip_l14", "clip_l14_336", "siglip_so400m")
    ),
]
"""Config and slices of each row."""
SCALED = "configs/clip/vit_l14_336.py"
CHIPS, EACH = (16, 64, 256), 128
"""Chips of v5e, and rows of a chip under weak scaling; strong scaling keeps the smallest batch."""
_GIB = 2**30


def plan(config: str, slices: str, *settings: str) -> list[dict[str, Any]]:
    """The plans of a config; also of one that does not fit."""
    words = ["launch.plan", f"--config={config}", f"--slice={slices}", *settings]
    print(f"python -m {' '.join(words)}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "plan.json")
        done = subprocess.run(
            [sys.executable, "-m", *words, f"--json={file}"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            check=False,
        )
        if not file.exists():
            raise SystemExit(f"{config}: the plan failed with {done.returncode}")
        return json.loads(file.read_text())


def memory(row: dict[str, Any]) -> str:
    total = row["total_bytes"]
    shown = "does not fit" if total is None else f"{total / _GIB:.2f}"
    return f"{shown} of {row['available_bytes'] / _GIB:.2f}"


def show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a Markdown table whose first column is text."""
    print(f"| {' | '.join(columns)} |")
    print(f"| --- |{' ---: |' * (len(columns) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def plans(only: str) -> None:
    """The table of the configs that ship."""
    rows = [
        [
            f"{config}, {row['slice']}",
            "×".join(str(size) for size in row["mesh"].values()),
            f"{row['batch_size']:,}",
            f"{row['state_bytes'] / _GIB:.2f}",
            memory(row),
            f"{row['hardware_flops'] / 1e12:,.0f}",
            f"{sum(row['collective_bytes'].values()) / 1e9:.2f}",
            *(f"{1e3 * row[f'{part}_seconds']:.0f}" for part in ("compute", "communication")),
            f"{100 * row['mfu_ceiling']:.0f}%",
        ]
        for config, slices in PLANS
        if only in config
        for row in plan(config, slices)
    ]
    columns = (
        *("config, slice", "mesh", "batch", "state, GiB", "chip, GiB", "TFLOP", "sent, GB"),
        *("compute, ms", "communication, ms", "MFU at most"),
    )
    show(columns, rows)


def scaling() -> None:
    """Bytes and traffic of a chip as chips grow: with the batch (weak), and without (strong)."""
    cases = [("weak", chips, EACH * chips) for chips in CHIPS]
    cases += [("strong", chips, EACH * CHIPS[0]) for chips in CHIPS[1:]]
    rows = []
    for kind, chips, batch in cases:
        (row,) = plan(SCALED, f"v5e-{chips}", f"--config.train.batch_size={batch}")
        compute, sent = row["compute_seconds"], row["communication_seconds"]
        rows.append(
            [
                f"{kind}, {chips} chips",
                f"{batch:,}",
                f"{batch // chips}",
                f"{row['state_bytes'] / _GIB:.2f}",
                memory(row),
                *(
                    f"{row['collective_bytes'].get(kind, 0) / 1e9:.2f}"
                    for kind in ("all-gather", "reduce-scatter", "all-reduce")
                ),
                f"{1e3 * compute:.0f}",
                f"{1e3 * sent:.0f}",
                # Computation grows with the rows of a chip; communication hardly does.
                f"{sent / compute * batch / chips:.1f}",
            ]
        )
    columns = (
        *("scaling", "batch", "rows of a chip", "state, GiB", "chip, GiB", "gathered, GB"),
        *("scattered, GB", "reduced, GB", "compute, ms", "communication, ms", "equal at rows"),
    )
    show(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("table", choices=("plans", "scaling"))
    parser.add_argument("--only", default="", help="configs whose path contains this")
    arguments = parser.parse_args()
    if arguments.table == "plans":
        plans(arguments.only)
    else:
        scaling()


if __name__ == "__main__":
    main()
