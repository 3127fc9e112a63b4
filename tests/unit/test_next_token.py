"""The chunked loss of a language model: values, gradients, memory, and the mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perception_jax.errors import ConfigError
from perception_jax.ops.next_token import IGNORE, NextTokenLoss, group_weights, next_token_loss
from perception_jax.shard import mesh as mesh_lib
from perception_jax.shard import program
from tests.arrays import normal

B, T, D, V = 8, 22, 16, 48


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, V, (B, T)).astype(np.int32)
    labels[rng.random((B, T)) < 0.3] = IGNORE
    return normal(1, B, T, D), normal(2, D, V), jnp.asarray(labels)


def reference(hidden, head, labels):
    """Mean over what `transformers` calls shifted labels."""
    log = jax.nn.log_softmax(hidden[:, :-1] @ head, axis=-1)
    wanted = labels[:, 1:]
    own = jnp.take_along_axis(log, jnp.maximum(wanted, 0)[..., None], axis=-1)[..., 0]
    counted = wanted != IGNORE
    return -jnp.sum(own * counted) / jnp.sum(counted)


@pytest.mark.parametrize("chunk", [1, 5, 11, 22, 1000])
def test_value_and_gradients_are_those_of_whole_logits(chunk):
    hidden, head, labels = inputs()

    def loss(hidden, head):
        return next_token_loss(hidden, lambda x: x @ head, labels, chunk=chunk).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)
    expected, wanted = jax.jit(jax.value_and_grad(reference, argnums=(0, 1)))(hidden, head, labels)
    np.testing.assert_allclose(value, expected, atol=1e-5)
    for ours, theirs in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_counts_and_special_labels():
    hidden, head, labels = inputs()
    out = next_token_loss(hidden, lambda x: x @ head, labels)
    assert int(out.count) == (labels[:, 1:] != IGNORE).sum()
    best = np.argmax(hidden[:, :-1] @ head, axis=-1)
    assert int(out.correct) == (best == labels[:, 1:]).sum()
    nothing = next_token_loss(hidden, lambda x: x @ head, jnp.full_like(labels, IGNORE))
    assert (float(nothing.mean()), int(nothing.count)) == (0.0, 0)
    wrong = labels.at[0, 3].set(V)  # e.g. a token that was added to the tokenizer alone
    assert np.isnan(float(next_token_loss(hidden, lambda x: x @ head, wrong).total))
    with pytest.raises(ConfigError, match="at least 1 token, found 0"):
        next_token_loss(hidden, lambda x: x @ head, labels, chunk=0)


def test_logits_are_never_whole_and_the_vocabulary_stays_split():
    hidden, head, labels = inputs()
    mesh = mesh_lib.make_mesh(2, 2, 2)
    batch = mesh_lib.batch_sharding(mesh)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))

    def loss(hidden, head, labels):
        return next_token_loss(hidden, lambda x: x @ head, labels, chunk=11).mean()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=(None, (batch, split)))
    with jax.set_mesh(mesh):
        args = (
            jax.device_put(hidden, batch),
            jax.device_put(head, split),
            jax.device_put(labels, batch),
        )
        compiled = step.lower(*args).compile()
        value, gradients = step(*args)
    shapes = {result.shape for result in program.results(compiled)}
    assert (B // 4, 11, V // 2) in shapes  # logits of a chunk on a chip
    assert not [shape for shape in shapes if len(shape) >= 3 and shape[-1] == V]
    assert not [shape for shape in shapes if len(shape) >= 3 and B in shape]
    expected, wanted = jax.value_and_grad(reference, argnums=(0, 1))(hidden, head, labels)
    np.testing.assert_allclose(value, expected, atol=1e-5)
    for ours, theirs in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_weights_of_groups_give_the_mean_of_their_means():
    """As devices with a mean of their own each; rows of a group need not be neighbours."""
    hidden, head, labels = inputs()
    group = jnp.array([2, 0, 2, 0, 5, 5, 0, 2])
    weights = group_weights(labels, group)
    whole = next_token_loss(hidden, lambda x: x @ head, labels, weights=weights, chunk=5)
    means = []
    for number in (0, 2, 5):
        own = np.flatnonzero(group == number)
        means.append(reference(hidden[own], head, labels[own]))
    np.testing.assert_allclose(whole.total, np.mean(means), atol=1e-5)
    plain = next_token_loss(hidden, lambda x: x @ head, labels)
    assert abs(float(whole.total - plain.mean())) > 1e-3
    assert (int(whole.count), int(whole.correct)) == (int(plain.count), int(plain.correct))
    # A group in which nothing is predicted counts, with a loss of 0.
    labels = labels.at[4:6].set(IGNORE)
    weights = group_weights(labels, group)
    whole = next_token_loss(hidden, lambda x: x @ head, labels, weights=weights)
    np.testing.assert_allclose(whole.total, sum(means[:2]) / 3, atol=1e-5)


def test_sums_of_micro_batches_add_up():
    hidden, head, labels = inputs()
    whole = next_token_loss(hidden, lambda x: x @ head, labels)
    halves = [
        next_token_loss(hidden[part], lambda x: x @ head, labels[part])
        for part in (slice(0, B // 2), slice(B // 2, B))
    ]
    joined: NextTokenLoss = jax.tree.map(jnp.add, *halves)
    assert int(joined.count) == int(whole.count)
    np.testing.assert_allclose(joined.mean(), whole.mean(), atol=1e-5)
