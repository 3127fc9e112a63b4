"""Runs a system on an image, on all images of a folder, or on prompts; or talks with a model.

    python -m launch.predict encoder --model=scenes-clip --image=photo.jpg --text=dog \
        --out=runs/maps
    python -m launch.predict encoder --model=facebook/dinov2-small --image=photos --scale=2 \
        --out=runs/maps
    python -m launch.predict give --model=runs/give_scenes --image=photo.jpg \
        --instruction=kite --candidates=names.txt --out=runs/kite
    python -m launch.predict text --model=HuggingFaceTB/SmolLM2-135M-Instruct --prompt=Hello
    python -m launch.predict chat --model=HuggingFaceTB/SmolLM2-135M-Instruct
    python -m launch.predict vqa --model=llava-hf/llava-1.5-7b-hf --image=photo.jpg \
        --question=Describe --out=runs/vqa
    python -m launch.predict blind_pairs --images=photos --out=runs/pairs
    python -m launch.predict mmvp_vlm --data=scenes --model=scenes-clip --out=runs/mmvp_vlm
    python -m launch.predict vqa_score --protocol=mmvp --data=MMVP --answers=runs/answers \
        --out=runs/mmvp

The first argument is the command. encoder: maps of an image encoder (attention, the patches and
pixels that count for each text, patch features), and how well the texts fit. give: the same encoder
conditioned on an instruction: its maps, whether the object is there, and which of many objects are.
Both write a picture and JSON for each image. text: a language model's answers to prompts. chat: a
conversation with it in the terminal, about images too where the model reads them. vqa: its answers
to questions about images, with pictures of where it looked and JSON. blind_pairs: pairs of images
in a folder that one encoder finds similar and another different. mmvp_vlm: the benchmark MMVP-VLM
for encoders. vqa_questions and vqa_score: questions of benchmarks for multimodal models, and scores
of the answers.
`python -m launch.predict COMMAND --help` shows the command's flags.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

from absl import flags

from launch import common, compile_cache, systems


def define_flags(system: Any, values: flags.FlagValues) -> None:
    """Defines the flags that all systems for images have, and the system's own."""
    flags.DEFINE_string(
        "model",
        None,
        "A checkpoint folder, the name of shipped weights, or a hub id; give: adapters (a file, "
        "their folder, or scenes-give).",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_string(
        "image", None, "An image, or a folder of them.", required=True, flag_values=values
    )
    flags.DEFINE_string("out", None, "Folder of the results.", required=True, flag_values=values)
    flags.DEFINE_float(
        "scale", 1.0, "Side of the input as a multiple of the model's own.", flag_values=values
    )
    system.define_flags(values)


PROGRAM = common.Program(
    name="predict",
    define={
        name: functools.partial(define_flags, system)
        for name, system in systems.predicting_programs().items()
    }
    | {name: define for name, (define, _) in systems.commands().items()},
)
"""The command line of this program."""


def run(parsed: common.Parsed) -> int:
    """Predicts; returns 0, or 1 if no image of a folder can be used."""
    compile_cache.skip_several_cpu_devices()
    if parsed.command in (commands := systems.commands()):
        return commands[parsed.command][1](parsed.flags)
    from perception_jax.inference.images import ImageRun

    system = systems.predicting_programs()[parsed.command]
    images = ImageRun.plan(pathlib.Path(parsed.flags.image), pathlib.Path(parsed.flags.out))
    return images.run(system.predictor(parsed.flags))


if __name__ == "__main__":
    common.start(PROGRAM, run)
