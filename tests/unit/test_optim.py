"""Optimizer: schedules, rules by path, freezing, decay, stacks of layers."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from perception_jax.errors import ConfigError
from perception_jax.train.config import DEFAULT_RULES, OptimConfig, OptimRule, TrainConfig
from perception_jax.train.optim import make_optimizer, match_rules, schedule

PLAIN = OptimConfig(schedule="constant", learning_rate=0.1, weight_decay=0.0, clip_norm=None)
EVERYTHING = (OptimRule(".*"),)


def leaves(seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        name.replace("__", "/"): jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in shapes.items()
    }


def apply(config: OptimConfig, params: dict, gradients: list[dict], steps: int = 10) -> dict:
    """Parameters after these gradients."""
    transform = make_optimizer(config, steps, params).transform
    return updated(transform, params, gradients)


def updated(transform: optax.GradientTransformation, params: dict, gradients: list[dict]) -> dict:
    @jax.jit
    def step(params, state, grads):
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(transform.init)(params)
    for grads in gradients:
        params, state = step(params, state, grads)
    return params


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("constant", 0, 0.25),  # first of four warm-up steps
        ("constant", 3, 1.0),
        ("constant", 99, 1.0),
        ("cosine", 4, 1.0),
        ("cosine", 12, 0.55),  # half-way: 0.1 + 0.9 / 2
        ("cosine", 20, 0.1),
        ("cosine", 500, 0.1),
        ("linear", 8, 0.775),  # a quarter of the way down to 0.1
        ("rsqrt", 13, 1.0),  # 9 steps after warm-up: up to `timescale` flat
        ("rsqrt", 40, 0.5),  # 36 after: sqrt(9 / 36)
    ],
)
def test_schedule_values(name: str, step: int, expected: float):
    config = OptimConfig(
        schedule=name, learning_rate=2.0, warmup_steps=4, final_fraction=0.1, timescale=9
    )
    np.testing.assert_allclose(schedule(config, 20)(step), 2.0 * expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (12, 0.5), (20, 0.0)]
)
def test_a_schedule_from_zero(step: int, expected: float):
    config = OptimConfig(learning_rate=2.0, warmup_steps=4, zero_start=True)
    np.testing.assert_allclose(schedule(config, 20)(step), 2.0 * expected, atol=1e-6)


def test_without_warm_up_nothing_starts_from_zero():
    for zero_start in (False, True):
        config = OptimConfig(learning_rate=2.0, zero_start=zero_start)
        np.testing.assert_allclose(schedule(config, 20)(0), 2.0)


def test_sgd_step_by_hand():
    # v = g; p - lr * multiplier * (v + decay * p): 1 - 0.1 * 2 * (0.5 + 0.3 * 1) = 0.84
    config = dataclasses.replace(
        PLAIN, name="sgd", b1=0.0, rules=(OptimRule("kernel", 2.0, 0.3), OptimRule(".*"))
    )
    params = {"a/kernel": jnp.ones(2), "a/bias": jnp.ones(2)}
    grads = {"a/kernel": jnp.full(2, 0.5), "a/bias": jnp.full(2, 0.5)}
    out = apply(config, params, [grads])
    np.testing.assert_allclose(out["a/kernel"], 0.84, rtol=1e-6)
    np.testing.assert_allclose(out["a/bias"], 0.95, rtol=1e-6)


def test_adamw_equals_optax():
    params = leaves(a__kernel=(4, 3))
    grads = [leaves(seed, a__kernel=(4, 3)) for seed in (1, 2, 3)]
    config = dataclasses.replace(PLAIN, weight_decay=0.02, rules=EVERYTHING)
    transform = optax.adamw(0.1, weight_decay=0.02)
    expected = updated(transform, params, grads)
    chex.assert_trees_all_close(apply(config, params, grads), expected, rtol=1e-6)


def test_clip_bounds_the_global_norm():
    config = dataclasses.replace(PLAIN, name="sgd", b1=0.0, clip_norm=1.0, rules=EVERYTHING)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    out = apply(config, params, [{"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)}])
    np.testing.assert_allclose([out["a"][0], out["b"][0]], [-0.06, -0.08], rtol=1e-6)


def test_gradients_are_clipped_before_the_moments():
    config = dataclasses.replace(PLAIN, clip_norm=1.0, rules=EVERYTHING)
    params = {"w": jnp.arange(4.0)}
    gradients = [{"w": jnp.array([1e3, -5.0, 2.0, 1.0])}, {"w": jnp.full(4, 0.1)}]
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    expected = updated(transform, params, gradients)
    chex.assert_trees_all_close(apply(config, params, gradients), expected, rtol=1e-6)


def test_frozen_leaves_stay_have_no_state_and_do_not_count_in_the_clip():
    config = dataclasses.replace(
        PLAIN,
        name="sgd",
        clip_norm=1.0,
        weight_decay=0.5,
        rules=(OptimRule("^tower/", None), *EVERYTHING),
    )
    params = {"tower/kernel": jnp.ones((5, 7)), "head": jnp.ones(1)}
    grads = {"tower/kernel": jnp.full((5, 7), 1e3), "head": jnp.full(1, 0.5)}
    transform = make_optimizer(config, 10, params).transform
    state = jax.eval_shape(transform.init, params)
    assert not [x.shape for x in jax.tree.leaves(state) if x.shape == (5, 7)]
    out = apply(config, params, [grads])
    np.testing.assert_array_equal(out["tower/kernel"], params["tower/kernel"])
    np.testing.assert_allclose(out["head"], 1 - 0.1 * (0.5 + 0.5), rtol=1e-6)


def test_unmatched_leaves_are_all_listed():
    config = dataclasses.replace(PLAIN, rules=(OptimRule("kernel$"),))
    with pytest.raises(ConfigError, match=r"(?s)2 leaves.*a/bias\n  b/scale"):
        make_optimizer(config, 10, ["a/kernel", "a/bias", "b/scale"])


def test_freezing_everything_is_refused():
    config = dataclasses.replace(PLAIN, rules=(OptimRule(".*", None),))
    with pytest.raises(ConfigError, match="freeze every leaf"):
        make_optimizer(config, 10, ["a"])


def test_by_default_only_weights_decay():
    """Biases, scales of norms and the loss's temperature and bias do not."""
    paths = ["logit_scale", "logit_bias", "a/bias", "a/scale", "a/kernel", "position_embedding"]
    found = match_rules(DEFAULT_RULES, paths)
    assert [rule.weight_decay for rule in found.values()] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor", "muon"])
def test_a_stack_trains_like_its_layers(name: str):
    config = dataclasses.replace(
        PLAIN, name=name, weight_decay=0.1, rules=EVERYTHING, matrices="kernel"
    )
    stacked = leaves(kernel=(3, 130, 140), bias=(3, 140))
    gradients = [leaves(seed, kernel=(3, 130, 140), bias=(3, 140)) for seed in (1, 2, 3)]
    whole = apply(config, stacked, gradients)
    for layer in range(3):
        one = apply(
            config,
            jax.tree.map(lambda x, i=layer: np.asarray(x)[i], stacked),
            [jax.tree.map(lambda x, i=layer: np.asarray(x)[i], grads) for grads in gradients],
        )
        for path, leaf in one.items():
            np.testing.assert_allclose(np.asarray(whole[path])[layer], leaf, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "halved"), [("adamw", 2), ("lion", 2), ("sgd", 2), ("adafactor", 2), ("muon", 2)]
)
def test_first_moments_in_bfloat16(name: str, halved: int):
    params = leaves(blocks__kernel=(130, 140), bias=(140,))
    gradients = [leaves(seed, blocks__kernel=(130, 140), bias=(140,)) for seed in range(1, 6)]
    full = dataclasses.replace(PLAIN, name=name, learning_rate=0.01, rules=EVERYTHING)
    half = dataclasses.replace(full, moment_dtype="bfloat16")
    kept, less = (
        [x for x in jax.tree.leaves(jax.eval_shape(transform.init, params)) if x.size > 1]
        for transform in (make_optimizer(config, 10, params).transform for config in (full, half))
    )
    assert [x.shape for x in kept] == [x.shape for x in less]
    assert {x.dtype for x in kept} == {jnp.dtype("float32")}
    assert [x.dtype for x in less].count(jnp.bfloat16) == halved  # a moment of each leaf
    expected, found = apply(full, params, gradients), apply(half, params, gradients)
    for path, start in params.items():
        moved = np.linalg.norm(np.asarray(expected[path]) - np.asarray(start))
        apart = np.linalg.norm(np.asarray(found[path]) - np.asarray(expected[path]))
        assert apart < 0.05 * moved, path
        assert apart > 0 or name == "lion"  # which goes by signs


def test_second_moments_decay_where_first_ones_are_bfloat16():
    """A bfloat16 number times 0.999 is itself: steps would stay as small as after one peak."""
    assert jnp.bfloat16(1.0) * jnp.bfloat16(0.999) == 1
    config = dataclasses.replace(PLAIN, b2=0.999, moment_dtype="bfloat16", rules=EVERYTHING)
    params = {"w": jnp.zeros(4)}
    transform = make_optimizer(config, 10, params).transform

    @jax.jit
    def peak_and_calm(state):
        _, state = transform.update({"w": jnp.full(4, 30.0)}, state, params)
        calm = lambda _, state: transform.update({"w": jnp.zeros(4)}, state, params)[1]  # noqa: E731
        return jax.lax.fori_loop(0, 1000, calm, state)

    second = [x for x in jax.tree.leaves(peak_and_calm(transform.init(params))) if x.shape == (4,)]
    (nu,) = [x for x in second if x.dtype == jnp.float32]
    np.testing.assert_allclose(nu, 0.001 * 900 * 0.999**1000, rtol=1e-3)


def test_adafactor_state_is_factored():
    config = dataclasses.replace(PLAIN, name="adafactor", b1=0.0, rules=EVERYTHING)
    params = leaves(kernel=(256, 512))
    state = jax.eval_shape(make_optimizer(config, 10, params).transform.init, params)
    assert sum(x.size for x in jax.tree.leaves(state)) < 2000


def test_muon_takes_orthogonal_steps_of_adams_size_and_leaves_the_rest_to_adam():
    config = dataclasses.replace(PLAIN, name="muon", rules=EVERYTHING)
    params = leaves(blocks__fc1__kernel=(2, 24, 64), blocks__bias=(2, 64), head__kernel=(8, 4))
    grads = leaves(1, blocks__fc1__kernel=(2, 24, 64), blocks__bias=(2, 64), head__kernel=(8, 4))
    out = apply(config, params, [grads])
    moved = {path: (np.asarray(params[path]) - np.asarray(out[path])) / 0.1 for path in params}
    # Newton-Schulz with five steps brings singular values near 1; rms 0.2 as arXiv 2502.16982.
    values = np.linalg.svd(moved["blocks/fc1/kernel"], compute_uv=False) / (0.2 * 64**0.5)
    np.testing.assert_allclose(values, 1.0, atol=0.4)
    left, _, right = np.linalg.svd(grads["blocks/fc1/kernel"], full_matrices=False)
    assert np.vdot(moved["blocks/fc1/kernel"], left @ right) > 0  # downhill
    for path in ("blocks/bias", "head/kernel"):
        np.testing.assert_allclose(moved[path], np.sign(grads[path]), rtol=1e-4)


def test_config_names_the_nearest_key_and_the_type():
    good = {"steps": 10, "batch_size": 4, "optim": {"rules": [("kernel", 0.5, False), (".*",)]}}
    rules = TrainConfig.from_mapping(good).optim.rules
    assert rules == (OptimRule("kernel", 0.5, False), OptimRule(".*"))
    for change, message in [
        ({"stepz": 1}, r"stepz: there is no such setting. Did you mean steps\?"),
        ({"optim": {"warmup": 1}}, r"optim.warmup.*Did you mean optim.warmup_steps\?"),
        ({"steps": 1.5}, r"steps: expected int, found 1.5 \(float\)"),
        ({"steps": True}, "steps: expected int"),
        ({"optim": {"name": "adam"}}, "optim.name: expected 'adamw' or"),
        ({"optim": {"rules": [("a", "b")]}}, r"rules\[0\].multiplier: expected float or None"),
        ({"batch_size": 0}, "batch_size: expected 1 or more"),
        ({"seed": -1}, "seed: expected 0 to"),
        ({"seed": 2**40}, "seed: expected 0 to"),
        ({"optim": {"b1": 1.0}}, r"b1: expected in \[0, 1\)"),
        ({"optim": {"b2": -0.1}}, r"b2: expected in \[0, 1\)"),
        ({"optim": {"eps": float("nan")}}, r"eps: expected in \(0, 1\)"),
        ({"optim": {"weight_decay": -0.1}}, r"weight_decay: expected in \[0, 10\)"),
        ({"optim": {"final_fraction": 2.0}}, r"final_fraction: expected in \[0, 1\]"),
        ({"optim": {"accumulate": 3}}, "optim.accumulate: expected a divisor of 4, the rows"),
        ({"optim": {"rules": [("(", 1.0)]}}, r"optim.rules: expected a regular expression"),
        ({"optim": {"rules": [("a", -1.0)]}}, "multiplier: expected 0 or more"),
    ]:
        with pytest.raises(ConfigError, match=message):
            TrainConfig.from_mapping({**good, **change})
    with pytest.raises(ConfigError, match="steps is missing"):
        TrainConfig.from_mapping({"batch_size": 4})
