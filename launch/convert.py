"""Converts a checkpoint from one layout to another.

python -m launch.convert SRC DST --to=hf --verify
"""

from __future__ import annotations

import pathlib
import sys
from typing import TYPE_CHECKING

from launch import common

if TYPE_CHECKING:
    from perception_jax.api import Layout, Loaded

PROGRAM = common.Program(
    name="convert",
    description=(
        "Reads a checkpoint in any layout that the library knows and writes it in another: every "
        "name is accounted for in the key report, DST is there whole or not at all."
    ),
    config="none",
    positional=(
        common.Argument("SRC", "A checkpoint folder or file, shipped weights or a hub id."),
        common.Argument("DST", "The folder to write; new or empty."),
    ),
    flags=(
        common.Flag(
            "to",
            help="Layout to write: Hugging Face's, the authors' or open_clip's, timm's, or ours.",
            choices=("hf", "reference", "timm", "jax"),
            required=True,
        ),
        common.Flag(
            "model_config", help="Settings of SRC where none lie beside it: a file or folder."
        ),
        common.Flag("section", help="State dict to read of a torch file that holds several."),
        common.Flag(
            "prefix",
            help="Reads the part of SRC whose names begin so, e.g. the image tower of a LLaVA.",
            default="",
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
        "python -m launch.convert dinov2_vitb14_pretrain.pth runs/dinov2-b --to=hf --verify",
        "python -m launch.convert openai/clip-vit-base-patch16 runs/tower --to=timm "
        "--prefix=vision_model.",
    ),
)


def run(parsed: common.Parsed) -> int:
    """Converts, prints the key report, and verifies if asked to."""
    import perception_jax

    source, target = parsed.positional["SRC"], pathlib.Path(parsed.positional["DST"])
    part = {name: parsed.flags[name] for name in ("section", "prefix", "dtype")}
    loaded = perception_jax.load(source, config=parsed.flags["model_config"], **part)
    print(f"{source}: {loaded.report}")
    perception_jax.export(
        loaded, target, layout=parsed.flags["to"], overwrite=parsed.flags["overwrite"]
    )
    size = sum(item.stat().st_size for item in target.iterdir())
    print(f"{target}: written in layout {parsed.flags['to']}, {size / 2**20:,.1f} MiB")
    if parsed.flags["verify"]:
        print(f"verified: {_verify(loaded, target, parsed.flags['to'])}")
    return 0


def _verify(loaded: Loaded, target: pathlib.Path, layout: Layout) -> str:
    """Reads `target` back; what of its leaves equals those of `loaded`."""
    from perception_jax.api import load, table_of
    from perception_jax.interop.verify import changed_leaves, compare_params
    from perception_jax.models.params import flatten

    again = load(target)
    before, after = flatten(loaded.model), flatten(again.model)
    changed = changed_leaves(table_of(again, layout), before, after)
    count = compare_params(
        {path: leaf for path, leaf in before.items() if path not in changed},
        {path: leaf for path, leaf in after.items() if path not in changed},
    )
    if not changed:
        return f"{count} leaves read back, all bit-equal"
    return (
        f"{count} leaves read back, bit-equal; the layout {layout!r} keeps {', '.join(changed)} in "
        "another form or not at all, which changes no output"
    )


if __name__ == "__main__":
    sys.exit(common.main(PROGRAM, run))
