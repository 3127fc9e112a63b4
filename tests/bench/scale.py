"""Compiles the training steps of `docs/scale.md` for TPU slices and prints its tables.

    python tests/bench/scale.py plans            # the configs that ship; --only=clip for some
    python tests/bench/scale.py scaling          # two models on 16, 64 and 256 chips

Every row is one command of `launch.plan`, printed before it runs. Needs libtpu (`make tpu`), up to
8 GB of memory and minutes for each row. Nothing runs on a TPU.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
LARGE = ("v5e-256", "v5p-128", "v6e-256")
DECODER = "configs/text/llama7b.py"
LLAVA = "configs/mof/llava15_finetune_clip.py"
SPLIT = "--config.train.mesh.tensor=2"
"""256 chips do not divide 128 rows."""


def longest(tokens: int) -> tuple[str, str]:
    """Settings of a LLaVA's batches of the longest rows alone, each with an image."""
    return ("--config.data.order=random", f"--config.data.lengths=({tokens},)")


PLANS = [
    *(("configs/clip/vit_b16.py", slice_) for slice_ in LARGE),
    *(("configs/clip/vit_l14_336.py", slice_) for slice_ in LARGE),
    *(("configs/siglip/so400m14_384.py", slice_) for slice_ in LARGE),
    *(
        (f"configs/give/{name}.py", slice_)
        for name in ("clip_b16", "clip_l14", "clip_l14_336", "siglip_so400m")
        for slice_ in ("v5e-16", "v5e-256")
    ),
    (DECODER, "v5e-256", SPLIT),
    (DECODER, "v5p-128"),
    (DECODER, "v5p-128", SPLIT),
    (f"{DECODER}:lora", "v5e-16"),
    (f"{LLAVA}:lora", "v5e-16", "--config.train.optim.accumulate=8", *longest(2688)),
    (LLAVA, "v5e-256", SPLIT, *longest(2688)),
    (LLAVA, "v5p-128", *longest(2688)),
    ("configs/mof/llava15_finetune_imof.py:batch=128", "v5p-128", *longest(3200)),
]
"""Config, slice and settings of each row."""
SCALED = [
    *(("configs/clip/vit_l14_336.py", "weak", chips, 128 * chips) for chips in (16, 64, 256)),
    *(("configs/clip/vit_l14_336.py", "strong", chips, 2048) for chips in (64, 256)),
    *((DECODER, "weak", chips, chips // 2, SPLIT) for chips in (16, 64, 256)),
    *(
        (DECODER, "strong", chips, 128, SPLIT, f"--config.train.optim.accumulate={parts}")
        for chips, parts in ((16, 16), (64, 4))
    ),
]
"""Config, kind of scaling, chips of v5e, rows and settings. Strong scaling keeps the batch of the
smallest (CLIP) or largest slice (the decoder, whose rows go through in micro-batches there)."""
UNKNOWN = "unknown"
"""Shown where a program was refused or cannot be read."""
_GIB = 2**30


def plan(config: str, slice_: str, *settings: str) -> dict[str, Any]:
    """The plan of a config with one shape of batches; also of one that does not fit."""
    words = ["launch.plan", f"--config={config}", f"--slice={slice_}", *settings]
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
        (row,) = json.loads(file.read_text())
        return row


def memory(row: dict[str, Any]) -> str:
    total = row["total_bytes"]
    shown = "does not fit" if total is None else f"{total / _GIB:.2f}"
    return f"{shown} of {row['available_bytes'] / _GIB:.2f}"


def sent(row: dict[str, Any], *kinds: str) -> str:
    """What a chip sends, of all kinds of collectives or of those named."""
    found = row["collective_bytes"]
    if found is None:
        return UNKNOWN
    return f"{sum(found.get(kind, 0) for kind in kinds or found) / 1e9:.2f}"


def communication(row: dict[str, Any]) -> str:
    """Milliseconds of communication."""
    seconds = row["communication_seconds"]
    return UNKNOWN if seconds is None else f"{1e3 * seconds:,.0f}"


def equal_rows(row: dict[str, Any]) -> str:
    """Rows of a chip at which computation, which grows with them, takes as long as communication,
    which hardly does."""
    compute, seconds = row["compute_seconds"], row["communication_seconds"]
    if seconds is None:
        return UNKNOWN
    return f"{seconds / compute * row['batch_size'] / math.prod(row['mesh'].values()):.2f}"


def show(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a Markdown table whose first column is text, each row when it is made."""
    print(f"| {' | '.join(columns)} |")
    print(f"| --- |{' ---: |' * (len(columns) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def plans(only: str) -> None:
    """The table of the configs that ship."""
    columns = (
        *("config, slice", "mesh", "batch", "state, GiB", "chip, GiB", "TFLOP", "sent, GB"),
        *("compute, ms", "communication, ms", "MFU at most"),
    )
    show(columns, (planned(*row) for row in PLANS if only in " ".join(row)))


def planned(config: str, slice_: str, *settings: str) -> list[str]:
    """A row of the table of plans."""
    row = plan(config, slice_, *settings)
    return [
        f"{config}, {slice_}",
        "×".join(str(size) for size in row["mesh"].values()),
        f"{row['batch_size']:,}",
        f"{row['state_bytes'] / _GIB:.2f}",
        memory(row),
        f"{row['hardware_flops'] / 1e12:,.0f}",
        sent(row),
        f"{1e3 * row['compute_seconds']:,.0f}",
        communication(row),
        f"{100 * row['mfu_ceiling']:.0f}%",
    ]


def scaling(only: str) -> None:
    """Bytes and traffic of a chip as chips grow: with the batch (weak), and without (strong)."""
    columns = (
        *("model, scaling", "chips", "batch", "state, GiB", "chip, GiB", "gathered, GB"),
        *("scattered, GB", "reduced, GB", "compute, ms", "communication, ms", "equal at rows"),
    )
    show(columns, (scaled(*row) for row in SCALED if only in " ".join(map(str, row))))


def scaled(config: str, kind: str, chips: int, batch: int, *settings: str) -> list[str]:
    """A row of the table of scaling."""
    row = plan(config, f"v5e-{chips}", f"--config.train.batch_size={batch}", *settings)
    return [
        f"{config}, {kind}",
        f"{chips}",
        f"{batch:,}",
        f"{row['state_bytes'] / _GIB:.2f}",
        memory(row),
        *(sent(row, name) for name in ("all-gather", "reduce-scatter", "all-reduce")),
        f"{1e3 * row['compute_seconds']:,.0f}",
        communication(row),
        equal_rows(row),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("table", choices=("plans", "scaling"))
    parser.add_argument("--only", default="", help="rows whose settings contain this")
    arguments = parser.parse_args()
    {"plans": plans, "scaling": scaling}[arguments.table](arguments.only)


if __name__ == "__main__":
    main()
