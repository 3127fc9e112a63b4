"""Benchmarks of questions about images: answers in a file to a score, one module per protocol."""

from perception_jax.evals.vqa import (
    asking,
    judging,
    llava_bench,
    lmms_eval,
    mmvp,
    mmvp_vlm,
    pope,
    textvqa,
)

__all__ = [
    "asking",
    "judging",
    "llava_bench",
    "lmms_eval",
    "mmvp",
    "mmvp_vlm",
    "pope",
    "textvqa",
]
