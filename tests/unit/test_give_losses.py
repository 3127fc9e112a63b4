"""OITC, OIIC and OID against the definitions written out as loops, in float64."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perception_jax.errors import ConfigError
from perception_jax.ops.losses import unit
from perception_jax.systems.give import losses
from perception_jax.systems.give.losses import LossConfig, RowLabels, all_losses, oiic, oitc

WIDTH = 5
TEMPERATURE = 0.07
"""Of OIIC, the default."""
oiic_at = functools.partial(oiic, temperature=TEMPERATURE)
PARTS = ("present", "absent", "text", "present_logit", "absent_logit")


def batch(seed, rows, images=3, classes=3, captions=4):
    """Small numbers, so that every case comes up."""
    rng = np.random.default_rng(seed)
    numbers = {
        name: rng.integers(below, size=rows).astype(np.int32)
        for name, below in (("image", images), ("label", classes), ("caption", captions))
    }
    vectors = rng.normal(size=(3, rows, WIDTH))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    logits = 3 * rng.normal(size=(2, rows))
    given = dict(zip(PARTS, (*vectors, *logits), strict=True))
    return numbers, {name: jnp.asarray(value, jnp.float32) for name, value in given.items()}


def rows_of(numbers):
    return RowLabels(**{name: jnp.asarray(values, jnp.int32) for name, values in numbers.items()})


def cross_entropy(logits, own):
    return math.log(sum(math.exp(x) for x in logits)) - own


def oitc_by_loops(numbers, image, text, scale):
    image, text = np.float64(image), np.float64(text)
    count = len(image)

    def ignored(m, n):
        same = all(numbers[name][m] == numbers[name][n] for name in ("image", "label"))
        return m != n and (same or numbers["caption"][m] == numbers["caption"][n])

    s = scale * image @ text.T
    total = 0.0
    for m in range(count):
        kept = [n for n in range(count) if not ignored(m, n)]
        total += cross_entropy([s[m, n] for n in kept], s[m, m])
        total += cross_entropy([s[n, m] for n in kept], s[m, m])
    return total / 2 / count


def oiic_by_loops(numbers, present, absent, temperature):
    present = np.float64(present)
    absent = present[:0] if absent is None else absent
    image, label = numbers["image"], numbers["label"]
    every = range(len(present))
    found = []
    for a in every:
        positives = [b for b in every if label[a] == label[b] and image[a] != image[b]]
        if not positives:
            continue
        compared = [b for b in every if not (label[a] == label[b] and image[a] == image[b])]
        z = [present[a] @ present[b] / temperature for b in compared]
        z += (
            [] if absent is None else [present[a] @ row / temperature for row in np.float64(absent)]
        )
        rest = [cross_entropy(z, present[a] @ present[b] / temperature) for b in positives]
        found.append(sum(rest) / len(rest))
    return sum(found) / len(found) if found else 0.0


def oid_by_loops(present, absent):
    terms = [math.log1p(math.exp(-x)) for x in np.float64(present)]
    terms += [math.log1p(math.exp(x)) for x in np.float64(absent)]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("rows", [1, 2, 7, 12])
@pytest.mark.parametrize("absent_rows", [True, False])
def test_losses_are_the_loops(rows, absent_rows):
    call = jax.jit(all_losses, static_argnums=0)
    for seed, temperature in enumerate((TEMPERATURE, TEMPERATURE, TEMPERATURE, 0.2, 0.2)):
        weights = {"oitc": 0.5, "oiic": 2.0, "oid": 3.0, "oiic_temperature": temperature}
        config = LossConfig(absent_rows=absent_rows, **weights)
        numbers, given = batch(seed, rows)
        found = call(config, rows_of(numbers), scale=jnp.float32(6.0), **given)
        absent = given["absent"] if absent_rows else None
        expected = {
            "oitc": oitc_by_loops(numbers, given["present"], given["text"], 6.0),
            "oiic": oiic_by_loops(numbers, given["present"], absent, temperature),
            "oid": oid_by_loops(given["present_logit"], given["absent_logit"]),
        }
        assert expected["oiic"] > 0 or rows < 7
        for name, value in expected.items():
            assert float(getattr(found, name)) == pytest.approx(value, abs=1e-6, rel=1e-6), name
        weighted = 0.5 * expected["oitc"] + 2 * expected["oiic"] + 3 * expected["oid"]
        assert float(found.total) == pytest.approx(weighted, abs=1e-6, rel=1e-6)


def test_gradients_are_finite_differences():
    """Of the loops: they share no code with the losses."""
    numbers, given = batch(3, 7)
    config = LossConfig(oitc=0.5, oiic=2.0, oid=3.0)

    def by_loops(given):
        return (
            0.5 * oitc_by_loops(numbers, given["present"], given["text"], 6.0)
            + 2 * oiic_by_loops(numbers, given["present"], given["absent"], TEMPERATURE)
            + 3 * oid_by_loops(given["present_logit"], given["absent_logit"])
        )

    def ours(given):
        return all_losses(config, rows_of(numbers), scale=jnp.float32(6.0), **given).total

    gradient = jax.jit(jax.grad(ours))(given)
    step, rng = 1e-5, np.random.default_rng(0)
    for name, value in given.items():
        for _ in range(4):
            direction = rng.normal(size=value.shape)
            sides = [
                by_loops({**given, name: np.float64(value) + move * direction})
                for move in (step, -step)
            ]
            slope = (sides[0] - sides[1]) / (2 * step)
            assert float(np.sum(gradient[name] * direction)) == pytest.approx(slope, rel=1e-5), name


def test_absent_rows_are_negatives_and_never_anchors():
    """Without a positive pair among the present rows nothing happens, whatever absent rows show."""
    numbers = {"image": [0, 1, 2, 3], "label": [0, 1, 2, 3], "caption": [0, 1, 2, 3]}
    _, given = batch(1, 4)
    present, absent = given["present"], jnp.repeat(given["present"][:1], 4, axis=0)
    slope = jax.jit(jax.value_and_grad(oiic_at, argnums=2))
    value, gradient = slope(present, rows_of(numbers), absent)
    assert (float(value), float(jnp.abs(gradient).max())) == (0.0, 0.0)
    # With one, an absent row costs the more the nearer it is to the anchors.
    pair = rows_of({**numbers, "label": [0, 0, 2, 3]})
    between = jnp.broadcast_to(unit(present[0] + present[1]), present.shape)
    costs = [float(slope(present, pair, sign * between)[0]) for sign in (-1, 0, 1)]
    assert float(oiic_at(present, pair)) < costs[0] < costs[1] < costs[2]


def test_rows_without_positives_are_left_out_of_the_mean():
    """Two rows are each other's positives, the third has none: it neither counts nor moves."""
    numbers = {"image": [0, 1, 2], "label": [0, 0, 1], "caption": [0, 1, 2]}
    _, given = batch(2, 3)
    rows, present = rows_of(numbers), given["present"]
    expected = oiic_by_loops(
        {name: np.asarray(v) for name, v in numbers.items()}, present, None, TEMPERATURE
    )
    assert float(oiic_at(present, rows)) == pytest.approx(expected, abs=1e-6)
    s = np.exp(np.float64(present) @ np.float64(present).T / TEMPERATURE)
    by_hand = -np.log(s[0, 1] / (s[0, 1] + s[0, 2])) - np.log(s[0, 1] / (s[0, 1] + s[1, 2]))
    assert expected == pytest.approx(by_hand / 2, rel=1e-12)


@pytest.mark.parametrize("absent_rows", [True, False])
@pytest.mark.parametrize("image", [[0, 0, 0], [0, 1, 2]], ids=["one image", "three images"])
def test_a_batch_of_one_object(image, absent_rows):
    """All rows ignore each other, or all are positives; nothing is NaN."""
    rows = rows_of({"image": image, "label": [4, 4, 4], "caption": [7, 7, 7]})
    _, given = batch(4, 3)

    def loss(present, absent):
        return oiic_at(present, rows, absent if absent_rows else None)

    slopes = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, gradients = slopes(given["present"], given["absent"])
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)
    if image[0] == image[1]:
        assert float(value) == 0
        assert all(float(jnp.abs(g).max()) == 0 for g in gradients)
    else:
        assert float(value) > 0
    # Equal captions: only the own text is left, and its softmax is 1.
    assert float(oitc(given["present"], given["text"], jnp.float32(9.0), rows)) == 0


def test_equal_captions_and_equal_objects_are_no_negatives():
    numbers = {"image": [0, 0, 0, 1, 1], "label": [0, 0, 1, 0, 2], "caption": [0, 1, 2, 2, 0]}
    expected = np.zeros((5, 5), bool)
    for m, n in ((0, 1), (0, 4), (2, 3)):  # same object; same caption twice
        expected[m, n] = expected[n, m] = True
    np.testing.assert_array_equal(losses.same_meaning(rows_of(numbers)), expected)
    positives = np.zeros((5, 5), bool)
    for m, n in ((0, 3), (1, 3)):
        positives[m, n] = positives[n, m] = True
    np.testing.assert_array_equal(losses.positive_pairs(rows_of(numbers)), positives)


def test_half_precision_embeddings_make_a_float32_loss():
    numbers, given = batch(6, 6)
    half = {name: value.astype(jnp.bfloat16) for name, value in given.items()}
    exact = {name: value.astype(jnp.float32) for name, value in half.items()}
    call = jax.jit(all_losses, static_argnums=0)
    found, expected = (
        call(LossConfig(), rows_of(numbers), scale=jnp.float32(100.0), **given)
        for given in (half, exact)
    )
    for name in ("total", "oitc", "oiic", "oid"):
        value = getattr(found, name)
        assert value.dtype == jnp.float32
        assert float(value) == float(getattr(expected, name))


@pytest.mark.parametrize("temperature", [0.0, -0.07, float("nan")])
def test_a_temperature_that_is_none(temperature):
    with pytest.raises(ConfigError, match="oiic_temperature: expected a finite number above 0"):
        LossConfig(oiic_temperature=temperature)
