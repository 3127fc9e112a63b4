"""The program of the encoder for `launch.predict`: maps, and how well texts fit."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:
    from perception_jax.inference.images import ImageResult


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `launch.predict encoder`."""
    flags.DEFINE_multi_string(
        "text", [], "A text to compare with the image; any number.", flag_values=values
    )
    flags.DEFINE_integer(
        "layer",
        -1,
        "Layer whose attention is shown; negative counts from the end.",
        flag_values=values,
    )


def predictor(values: flags.FlagValues) -> Callable[[pathlib.Path], ImageResult]:
    """Gives what `launch.predict encoder` does with each image."""
    import perception_jax
    from perception_jax.inference.single_image import results_of
    from perception_jax.systems.encoder.picture import draw
    from perception_jax.systems.encoder.predict import EncoderPrediction, Explainer

    loaded = perception_jax.load(values.model)
    explain = Explainer(loaded, tuple(values.text), layer=values.layer, scale=values.scale)

    def summary(prediction: EncoderPrediction) -> list[str]:
        best = sorted(prediction.scores, key=lambda score: -score.cosine)[:3]
        return [f"{score.text}: {score.cosine:.3f}" for score in best]

    return results_of(explain, draw, summary, {"model": values.model})
