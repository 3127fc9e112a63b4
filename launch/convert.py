"""Converts a checkpoint from one layout to another.

python -m launch.convert SRC DST --to=hf --verify
"""

from __future__ import annotations

import pathlib
import sys

from launch import common

PROGRAM = common.Program(
    name="convert",
    description=(
        "Reads a checkpoint in any layout that the library knows and writes it in another: every "
        "name is accounted for in the key report, DST is there whole or not at all."
    ),
    config="none",
    positional=(
        common.Argument("SRC", "A checkpoint folder, shipped weights or a hub id."),
        common.Argument("DST", "The folder to write; new or empty."),
    ),
    flags=(
        common.Flag(
            "to",
            help="Layout to write: Hugging Face's, the authors' own, or ours.",
            choices=("hf", "reference", "jax"),
            required=True,
        ),
        common.Flag(
            "dtype",
            help="Changes the floating-point numbers; without it they stay as stored.",
            choices=("float32", "bfloat16", "float16"),
        ),
        common.Flag("verify", bool, False, "Reads DST back and compares it bit by bit."),
        common.Flag("overwrite", bool, False, "Replaces what is in DST."),
    ),
    examples=(
        "python -m launch.convert scenes-clip runs/scenes-clip-hf --to=hf --verify",
        "python -m launch.convert openai/clip-vit-base-patch16 runs/clip-b16 --to=jax",
    ),
)


def run(parsed: common.Parsed) -> int:
    """Converts, prints the key report, and verifies if asked to."""
    import perception_jax
    from perception_jax.interop.verify import compare_params
    from perception_jax.models.params import flatten

    source, target = parsed.positional["SRC"], pathlib.Path(parsed.positional["DST"])
    loaded = perception_jax.load(source, dtype=parsed.flags["dtype"])
    print(f"{source}: {loaded.report}")
    perception_jax.export(
        loaded, target, layout=parsed.flags["to"], overwrite=parsed.flags["overwrite"]
    )
    size = sum(item.stat().st_size for item in target.iterdir())
    print(f"{target}: written in layout {parsed.flags['to']}, {size / 2**20:,.1f} MiB")
    if parsed.flags["verify"]:
        again = perception_jax.load(target)
        count = compare_params(flatten(loaded.model), flatten(again.model))
        print(f"verified: {count} leaves read back, all bit-equal")
    return 0


if __name__ == "__main__":
    sys.exit(common.main(PROGRAM, run))
