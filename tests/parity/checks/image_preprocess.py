"""Golden check of `data.processors`: the references' own preprocessed arrays."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from perception_jax.data.processors import ImageProcessor
from perception_jax.ops.image import normalise
from tests.parity.cases import Case, check


@check("mmvp_mof", when=lambda case: case.name.startswith("image_preprocess"))
def image_preprocess(case: Case) -> None:
    settings, arrays = case.settings, case.arrays
    raw = [arrays[f"raw_{k}"] for k in range(len(settings["raw_sizes_wh"]))]
    for name, one in settings["arrays"].items():
        padding = {"pad_colour": tuple(one["pad_color"])} if "pad_color" in one else {}
        processor = ImageProcessor(
            size=settings["size"],
            mode=one["mode"],
            mean=tuple(one["mean"]),
            std=tuple(one["std"]),
            **padding,
        )
        pixels = np.stack([processor(image).pixels for image in raw])
        values = np.asarray(normalise(jnp.asarray(pixels), processor.mean, processor.std))
        np.testing.assert_allclose(
            values.transpose(0, 3, 1, 2), arrays[name], rtol=0, atol=1e-6, err_msg=name
        )
