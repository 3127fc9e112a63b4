"""Converts a checkpoint from one layout to another.

    python -m launch.convert scenes-clip runs/scenes-clip-hf --to=hf --verify
    python -m launch.convert dinov2_vitb14_pretrain.pth runs/dinov2-b --to=hf --verify
    python -m launch.convert openai/clip-vit-base-patch16 runs/tower --to=timm \
        --prefix=vision_model.

Reads SRC (a checkpoint folder or file, shipped weights or a hub id) in any layout that the library
knows and writes the folder DST, new or empty, in another: every name is accounted for in the key
report, DST is written atomically.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from absl import flags

from launch import common

if TYPE_CHECKING:
    from perception_jax.api import Layout, Loaded


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    flags.DEFINE_enum(
        "to",
        None,
        ("hf", "reference", "timm", "jax"),
        "Layout to write: Hugging Face's, the authors' or open_clip's, timm's, or ours.",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_string(
        "model_config",
        None,
        "Settings of SRC where none are next to it: a file or folder.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "section", None, "State dict to read of a torch file with several.", flag_values=values
    )
    flags.DEFINE_string(
        "prefix",
        "",
        "Reads the part of SRC whose names begin so, e.g. the image tower of a LLaVA.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "dtype",
        None,
        ("float32", "bfloat16", "float16"),
        "Changes the floating-point numbers; without it they stay as stored.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "verify", False, "Reads DST back and compares it bit by bit.", flag_values=values
    )
    flags.DEFINE_bool("overwrite", False, "Replaces what is in DST.", flag_values=values)


PROGRAM = common.Program(name="convert", define=define_flags, positional=("SRC", "DST"))
"""The command line of this program."""


def run(parsed: common.Parsed) -> int:
    """Converts, prints the key report, and verifies if asked to."""
    import perception_jax

    source, target = parsed.positional["SRC"], pathlib.Path(parsed.positional["DST"])
    part = {name: parsed.flags[name].value for name in ("section", "prefix", "dtype")}
    loaded = perception_jax.load(source, config=parsed.flags.model_config, **part)
    print(f"{source}: {loaded.report}")
    perception_jax.export(loaded, target, layout=parsed.flags.to, overwrite=parsed.flags.overwrite)
    size = sum(item.stat().st_size for item in target.iterdir())
    print(f"{target}: written in layout {parsed.flags.to}, {size / 2**20:,.1f} MiB")
    if parsed.flags.verify:
        print(f"verified: {_verify(loaded, target, parsed.flags.to)}")
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
    common.start(PROGRAM, run)
