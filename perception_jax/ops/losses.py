"""Losses that compare rows of the global batch: of images with texts, of two views of images.

Letters: B batch, D embedding width.

Under `jax.jit` with a sharded batch the products below span all devices, so each row is compared
with every row of the global batch, whatever the mesh; a chip holds the products of its own images
with all texts. All arithmetic is float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from perception_jax.errors import ConfigError
from perception_jax.ops.sharding import constrain


def unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """L2-normalises the last axis in float32; a zero vector stays zero (floor 1e-12)."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def softmax_contrastive(
    image: Float[Array, "B D"],
    text: Float[Array, "B D"],
    scale: Float[Array, ""],
    *,
    ignore: Bool[Array, "B B"] | None = None,
    harder: Float[Array, "B K"] | None = None,
) -> Float[Array, ""]:
    """CLIP's symmetric cross-entropy (Radford et al., arXiv 2103.00020, figure 3).

    Args:
      image, text: unit vectors; row i of one belongs to row i of the other.
      scale: inverse temperature, already exponentiated.
      ignore: (image, text) pairs that are neither positive nor negative, e.g. equal texts; they
        leave the denominator. The diagonal is never ignored.
      harder: cosines of each image with further texts that are not its own; -inf for none.

    Raises:
      ConfigError: images and texts of different shapes.
    """
    logits = scale * _similarity(image, text)
    if ignore is not None:
        logits = jnp.where(_off_diagonal(ignore), -jnp.inf, logits)
    own = _diagonal(logits)
    rows = logits
    if harder is not None:
        none = jnp.isneginf(harder)
        # The gradient of scale * -inf with respect to the scale would be NaN.
        more = jnp.where(none, -jnp.inf, scale * jnp.where(none, 0.0, harder))
        rows = jnp.concatenate([logits, more], axis=1)
    to_text = jax.nn.logsumexp(rows, axis=1) - own
    to_image = jax.nn.logsumexp(logits, axis=0) - own
    return 0.5 * (jnp.mean(to_text) + jnp.mean(to_image))


def sigmoid_contrastive(
    image: Float[Array, "B D"],
    text: Float[Array, "B D"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    ignore: Bool[Array, "B B"] | None = None,
) -> Float[Array, ""]:
    """SigLIP's pairwise loss (Zhai et al., arXiv 2303.15343, algorithm 1): summed over texts,
    averaged over images.

    Args:
      image, text: unit vectors; row i of one belongs to row i of the other.
      scale: inverse temperature, already exponentiated.
      bias: added to every logit.
      ignore: pairs that are neither positive nor negative. The diagonal is never ignored.

    Raises:
      ConfigError: images and texts of different shapes.
    """
    logits = scale * _similarity(image, text) + bias
    sign = 2.0 * jnp.eye(logits.shape[0], dtype=jnp.float32) - 1.0
    terms = jax.nn.log_sigmoid(sign * logits)
    if ignore is not None:
        terms = jnp.where(_off_diagonal(ignore), 0.0, terms)
    return -jnp.sum(terms) / logits.shape[0]


def nt_xent(
    one: Float[Array, "*B D"],
    two: Float[Array, "*B D"],
    temperature: float,
    *,
    mask: Bool[Array, "*B"] | None = None,
    groups: Int[Array, "*B"] | None = None,
) -> dict[str, Float[Array, ""]]:
    """SimCLR's loss (Chen et al., arXiv 2002.05709, equation 1), and how often it is right.

    "contrast" is the mean cross-entropy in nats of recognising a row's other view among all other
    rows of both views, "recognised" the share of rows for which it is the most similar one. Under a
    sharded batch the rows are those of the global one: chips gather them.

    Args:
      one, two: embeddings of two views, row by row; they are normalised here.
      temperature: divides cosines.
      mask: rows that count, as anchors and as negatives; all by default. At least two must.
      groups: rows of equal numbers are negatives of each other in different views only. By default
        every row is a group.
    """
    kept = (jnp.ones(one.shape[:-1], bool) if mask is None else mask).ravel()
    one, two = (constrain(unit(x).reshape(-1, x.shape[-1]), "batch") for x in (one, two))
    pairs = _similarity(one, two) / temperature
    own, same = _diagonal(pairs), jnp.eye(len(kept), dtype=bool)
    together = same if groups is None else groups.ravel()[:, None] == groups.ravel()
    negative = jnp.concatenate([kept & ~same, kept & ~together], axis=1)
    loss, right = 0.0, 0.0
    for view, across in ((one, pairs), (two, constrain(pairs.T, "batch"))):
        within = _similarity(view, view) / temperature
        others = jnp.concatenate([across, within], axis=1)
        others = jnp.where(negative, others, -jnp.inf)
        terms = jnp.logaddexp(jax.nn.logsumexp(others, axis=1), own) - own
        loss += jnp.mean(terms, where=kept) / 2
        right += jnp.mean(own > jnp.max(others, axis=1), where=kept) / 2
    return {"contrast": loss, "recognised": right}


def vicreg(
    one: Float[Array, "*B D"],
    two: Float[Array, "*B D"],
    *,
    mask: Bool[Array, "*B"] | None = None,
) -> dict[str, Float[Array, ""]]:
    """Terms of VICReg (Bardes et al., arXiv 2105.04906, §3), scaled as in the authors' code.

    "invariance" is the mean squared difference of the two; "variance" the mean of
    max(0, 1 - standard deviation) over columns, averaged over the two; "covariance" the sum of the
    squared off-diagonal covariances by D, summed over the two. Statistics are those of all rows,
    so under a sharded batch of the global one; chips exchange sums of D and D × D numbers.

    Args:
      one, two: embeddings of two views, row by row; not normalised.
      mask: rows that count; all by default. At least two must.
    """
    one, two = one.astype(jnp.float32), two.astype(jnp.float32)
    weight = jnp.ones(one.shape[:-1]) if mask is None else mask.astype(jnp.float32)
    weight = weight[..., None]
    rows, width = jnp.sum(weight), one.shape[-1]
    terms = {"invariance": jnp.sum(weight * jnp.square(one - two)) / (rows * width)}
    spreads = [_spread(x, weight, rows) for x in (one, two)]
    terms["variance"] = sum(spread["variance"] for spread in spreads) / 2
    terms["covariance"] = sum(spread["covariance"] for spread in spreads)
    return terms


def _spread(
    x: Float[Array, "*B D"], weight: Float[Array, "*B 1"], rows: Float[Array, ""]
) -> dict[str, Float[Array, ""]]:
    """The variance and covariance terms of one view."""
    axes, width = tuple(range(x.ndim - 1)), x.shape[-1]
    centred = weight * (x - jnp.sum(weight * x, axis=axes) / rows)
    covariance = jnp.tensordot(centred, centred, (axes, axes)) / jnp.maximum(rows - 1, 1.0)
    own = jnp.eye(width, dtype=bool)
    deviation = jnp.sqrt(jnp.sum(covariance, axis=1, where=own) + 1e-4)
    return {
        "variance": jnp.mean(jax.nn.relu(1.0 - deviation)),
        "covariance": jnp.sum(jnp.square(covariance), where=~own) / width,
    }


def _diagonal(logits: Float[Array, "B B"]) -> Float[Array, " B"]:
    # A sum of one entry and zeros: `jnp.diagonal` would gather from the rows of all chips.
    own = jnp.eye(logits.shape[0], dtype=bool)
    return jnp.sum(logits, axis=1, where=own)


def _off_diagonal(pairs: Bool[Array, "B B"]) -> Bool[Array, "B B"]:
    return pairs & ~jnp.eye(pairs.shape[0], dtype=bool)


def _similarity(image: Float[Array, "B D"], text: Float[Array, "B D"]) -> Float[Array, "B B"]:
    if image.shape != text.shape:
        raise ConfigError(
            f"contrastive loss: expected as many texts as images and of their width, found images "
            f"{image.shape} and texts {text.shape}."
        )
    similarity = jnp.matmul(image.astype(jnp.float32), text.astype(jnp.float32).T)
    return constrain(similarity, "batch")  # each chip compares its own images
