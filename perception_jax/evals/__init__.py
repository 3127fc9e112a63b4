"""Scores as pure functions of predictions and annotations, and the baselines they must beat."""

from perception_jax.evals import baselines, intervals, predictions, ranking, runner, vqa, zero_shot

__all__ = ["baselines", "intervals", "predictions", "ranking", "runner", "vqa", "zero_shot"]
