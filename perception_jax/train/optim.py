"""Optimizer from config: schedule, and path rules for learning rate, decay and freezing.

All transforms act leaf by leaf (or, for the clip, on the global norm), and rules go by path, not
by rank: a stack of layers with leaves `[L, ...]` trains exactly like L separate layers. Decay is
decoupled for every optimizer (Loshchilov & Hutter, arXiv 1711.05101).
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from perception_jax.errors import ConfigError
from perception_jax.train.config import OptimConfig, OptimRule

Schedule = Callable[[jax.Array | int], jax.Array]
"""Learning rate by step."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transform over flat dicts of leaves, and the learning rate that it uses.

    Attributes:
      transform: its `update` needs the parameters.
      learning_rate: trainer step → rate of the update at that step, before rules' multipliers.
    """

    transform: optax.GradientTransformation
    learning_rate: Schedule


def make_optimizer(config: OptimConfig, steps: int, paths: Iterable[str]) -> Optimizer:
    """Builds the optimizer for the leaves at `paths`.

    Args:
      steps: length of the run in trainer steps; where "cosine" and "linear" end.

    Raises:
      ConfigError: some paths match no rule (all are listed), or every path is frozen.
    """
    rules = match_rules(config.rules, paths)
    labels = {path: _FROZEN if rule.freezes else _TRAINED for path, rule in rules.items()}
    if _TRAINED not in labels.values():
        raise ConfigError("optim.rules freeze every leaf that could train; nothing is left to do.")
    rate = schedule(config, steps)
    chain = [
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm),
        _core(config),
        _add_decay({path: _decay(rule, config) for path, rule in rules.items()}),
        _scale({path: rule.multiplier for path, rule in rules.items()}),
        optax.scale_by_schedule(lambda step: -rate(step)),
    ]
    transform = optax.partition(
        {_TRAINED: optax.chain(*chain), _FROZEN: optax.set_to_zero()}, labels
    )
    return Optimizer(transform, rate)


def match_rules(rules: Iterable[OptimRule], paths: Iterable[str]) -> dict[str, OptimRule]:
    """The first rule that matches each path; raises `ConfigError` listing unmatched paths."""
    rules, matched, unmatched = tuple(rules), {}, []
    for path in paths:
        rule = next((rule for rule in rules if re.search(rule.pattern, path)), None)
        if rule is None:
            unmatched.append(path)
        else:
            matched[path] = rule
    if unmatched:
        raise ConfigError(
            f"{len(unmatched)} leaves match none of optim.rules "
            f"({[rule.pattern for rule in rules]}):\n  " + "\n  ".join(unmatched) + "\n"
            "Add a rule for them; ('.*', 1.0, True) at the end trains the rest, "
            "('.*', None) freezes it."
        )
    return matched


def frozen_paths(rules: Iterable[OptimRule], paths: Iterable[str]) -> list[str]:
    """The paths that rules freeze; logs how many leaves each rule matches.

    Raises:
      ConfigError: some paths match no rule.
    """
    rules = tuple(rules)
    matched = match_rules(rules, paths)
    for rule in rules:
        count = sum(chosen is rule for chosen in matched.values())
        _log.info(
            "optimizer rule %r: %d leaves, learning rate x %s", rule.pattern, count, rule.multiplier
        )
    return [path for path, rule in matched.items() if rule.freezes]


def schedule(config: OptimConfig, steps: int) -> Schedule:
    """Trainer step (from 0) → learning rate; without `zero_start` the first step is above 0."""
    warmup, first = config.warmup_steps, 0 if config.zero_start else 1
    after = max(steps - warmup, 1)

    def rate(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / after, 0.0, 1.0)
        floor = config.final_fraction
        shape = {
            "constant": lambda: jnp.ones_like(step),
            "cosine": lambda: floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            "linear": lambda: floor + (1 - floor) * (1 - progress),
            "rsqrt": lambda: jnp.sqrt(
                config.timescale / jnp.maximum(step - warmup, config.timescale)
            ),
        }[config.schedule]()
        rise = jnp.minimum((step + first) / warmup, 1.0) if warmup else 1.0
        return config.learning_rate * rise * shape

    return rate


_TRAINED, _FROZEN = "trained", "frozen"
_MATRIX, _OTHER = "matrix", "other"
_MUON_RMS = 0.2
"""Size of Muon's updates, about Adam's: learning rates and decay carry over (arXiv 2502.16982)."""


def _core(config: OptimConfig) -> optax.GradientTransformation:
    dtype = config.moment_dtype
    if config.name == "adamw":
        return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=dtype)
    if config.name == "lion":
        return optax.scale_by_lion(config.b1, config.b2, mu_dtype=dtype)
    if config.name == "muon":
        return _muon(config)
    if config.name == "sgd":
        return optax.trace(config.b1, accumulator_dtype=dtype) if config.b1 else optax.identity()
    # Adafactor (Shazeer & Stern, arXiv 1804.04235) without its clip per leaf, which would mix the
    # layers of a stack; the global clip does its work.
    momentum = optax.ema(config.b1, debias=False, accumulator_dtype=dtype)
    return optax.chain(optax.scale_by_factored_rms(), momentum if config.b1 else optax.identity())


def _muon(config: OptimConfig) -> optax.GradientTransformation:
    """Muon for the matrices, Adam for the rest. Axes before the last two are layers of a stack."""
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def labels(params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda keys, p: _MATRIX if _is_matrix(config, keys[-1].key, p) else _OTHER, params
        )

    def per_matrix(params: Any) -> Any:
        return jax.tree.map(lambda p: axes, params)

    def to_adams_size(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(lambda u: _MUON_RMS * max(u.shape[-2:]) ** 0.5 * u, updates)

    dtype = config.moment_dtype
    orthogonal = optax.contrib.scale_by_muon(mu_dtype=dtype, weight_dimension_numbers=per_matrix)
    matrices = optax.chain(orthogonal, optax.stateless(to_adams_size))
    others = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=dtype)
    return optax.partition({_MATRIX: matrices, _OTHER: others}, labels)


def _is_matrix(config: OptimConfig, path: str, leaf: jax.Array) -> bool:
    return leaf.ndim >= 2 and re.search(config.matrices, path) is not None


def _decay(rule: OptimRule, config: OptimConfig) -> float:
    if isinstance(rule.weight_decay, bool):
        return config.weight_decay if rule.weight_decay else 0.0
    return rule.weight_decay


def _add_decay(decay: Mapping[str, float]) -> optax.GradientTransformation:
    def update(updates: Any, params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda keys, u, p: u + decay[keys[-1].key] * p if decay[keys[-1].key] else u,
            updates,
            params,
        )

    return optax.stateless(update)


def _scale(multiplier: Mapping[str, float | None]) -> optax.GradientTransformation:
    def update(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map_with_path(lambda keys, u: u * multiplier[keys[-1].key], updates)

    return optax.stateless(update)
