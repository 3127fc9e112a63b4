"""Contrastive losses against loops written out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perception_jax.errors import ConfigError
from perception_jax.ops import losses
from tests.arrays import normal

softmax_contrastive = jax.jit(losses.softmax_contrastive)
sigmoid_contrastive = jax.jit(losses.sigmoid_contrastive)
unit = jax.jit(losses.unit)


def vectors(seed, rows=5, width=4):
    return unit(normal(seed, rows, width)), unit(normal(seed + 1000, rows, width))


IGNORE = np.zeros((5, 5), bool)
IGNORE[1, 2] = IGNORE[2, 1] = IGNORE[3, 3] = True


@pytest.mark.parametrize("ignore", [None, IGNORE])
def test_softmax_contrastive_equals_loops(ignore):
    image, text = vectors(0)
    scale = 7.0
    skip = IGNORE & ~np.eye(5, dtype=bool) if ignore is not None else np.zeros((5, 5), bool)
    s = np.exp(scale * np.asarray(image, np.float64) @ np.asarray(text, np.float64).T)
    total = 0.0
    for i in range(5):
        row = sum(s[i, j] for j in range(5) if not skip[i, j])
        column = sum(s[j, i] for j in range(5) if not skip[j, i])
        total -= np.log(s[i, i] / row) + np.log(s[i, i] / column)
    given = None if ignore is None else jnp.asarray(ignore)
    loss = softmax_contrastive(image, text, jnp.float32(scale), ignore=given)
    assert float(loss) == pytest.approx(total / 10, rel=1e-5)


@pytest.mark.parametrize("ignore", [None, IGNORE])
def test_sigmoid_contrastive_equals_loops(ignore):
    image, text = vectors(1)
    scale, bias = 3.0, -1.5
    skip = IGNORE & ~np.eye(5, dtype=bool) if ignore is not None else np.zeros((5, 5), bool)
    logits = scale * np.asarray(image, np.float64) @ np.asarray(text, np.float64).T + bias
    total = 0.0
    for i in range(5):
        for j in range(5):
            if not skip[i, j]:
                total += np.log1p(np.exp(-logits[i, j] if i == j else logits[i, j]))
    given = None if ignore is None else jnp.asarray(ignore)
    loss = sigmoid_contrastive(image, text, jnp.float32(scale), jnp.float32(bias), ignore=given)
    assert float(loss) == pytest.approx(total / 5, rel=1e-5)


def test_losses_do_not_overflow_at_clip_temperature():
    image, text = vectors(2)
    gradient = jax.jit(jax.grad(losses.softmax_contrastive))
    for sign in (1.0, -1.0):
        found = gradient(image, jnp.asarray(sign * np.asarray(text)), jnp.float32(100.0))
        assert np.isfinite(found).all()


def test_a_row_without_harder_texts_leaves_the_gradient_of_the_scale_finite():
    image, text = vectors(3)
    harder = jnp.asarray([[0.3], [-np.inf], [0.9], [-np.inf], [0.1]], jnp.float32)

    def loss(scale):
        return losses.softmax_contrastive(image, text, scale, harder=harder)

    slope = float(jax.jit(jax.grad(loss))(jnp.float32(5.0)))
    cosine, more = np.asarray(image @ text.T, np.float64), np.asarray(harder, np.float64)

    def by_hand(scale):
        logits = scale * cosine
        rows = np.log(np.exp(logits).sum(1) + np.exp(scale * more[:, 0])) - np.diag(logits)
        columns = np.log(np.exp(logits).sum(0)) - np.diag(logits)
        return 0.5 * (rows.mean() + columns.mean())

    assert slope == pytest.approx((by_hand(5.001) - by_hand(4.999)) / 0.002, rel=1e-4)


def test_one_image_is_not_spread_over_several_texts(unchecked):
    image, text = vectors(2)
    for name, more in (("softmax_contrastive", ()), ("sigmoid_contrastive", (jnp.float32(0.0),))):
        with pytest.raises(ConfigError, match="as many texts as images"):
            jax.eval_shape(getattr(losses, name), image[:1], text, jnp.float32(1.0), *more)


def test_unit_of_zero_is_zero_with_finite_gradient():
    zero = jnp.zeros((1, 3))
    assert np.array_equal(unit(zero), zero)
    assert np.isfinite(jax.jit(jax.grad(lambda x: unit(x).sum()))(zero)).all()
