"""The program of LLaVA and Mixture of Features for `launch`: training (see `training`)."""

from perception_jax.systems.mof.training import data, finish, load, report, shapes, task

__all__ = ["data", "finish", "load", "report", "shapes", "task"]
