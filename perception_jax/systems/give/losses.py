"""Object-focused visual semantic learning: OITC, OIIC and OID.

The names, their purpose and that OID is a binary decision are the paper's (arXiv 2410.20109); the
formulas are this library's resolution, since the paper's could not be confirmed. Everything is
float32 and over the global batch: under `jax.jit` with sharded rows the products span all devices.

A row is one (image, object) tuple. Letters: M rows of the batch, D embedding width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from perception_jax import settings
from perception_jax.ops.losses import softmax_contrastive


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowLabels:
    """Indices of each row's image, class and caption; equal indices mean equal things.

    Attributes:
      image: the image.
      label: the class that the instruction names; it is in the image.
      caption: the caption's text.
    """

    image: Int[Array, " M"]
    label: Int[Array, " M"]
    caption: Int[Array, " M"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Settings of the three losses.

    Attributes:
      oitc, oiic, oid: weights; 0 leaves a loss out.
      absent_rows: whether rows conditioned on an absent class are negatives of OIIC.
      oiic_temperature: divides the cosines of OIIC. (OITC uses the backbone's own temperature.)

    Raises:
      ConfigError: a temperature that is not a number above 0.
    """

    oitc: float = 1.0
    oiic: float = 1.0
    oid: float = 1.0
    absent_rows: bool = True
    oiic_temperature: float = 0.07

    def __post_init__(self) -> None:
        settings.check(self.oiic_temperature, settings.Number(above=0.0), "oiic_temperature")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses:
    """The weighted total of the losses and its parts, float32 scalars."""

    total: Float[Array, ""]
    oitc: Float[Array, ""]
    oiic: Float[Array, ""]
    oid: Float[Array, ""]


def all_losses(
    config: LossConfig,
    rows: RowLabels,
    *,
    present: Float[Array, "M D"],
    absent: Float[Array, "M D"],
    text: Float[Array, "M D"],
    present_logit: Float[Array, " M"],
    absent_logit: Float[Array, " M"],
    scale: Float[Array, ""],
    harder: Float[Array, "M K"] | None = None,
) -> Losses:
    """Computes OITC, OIIC, OID and their weighted sum.

    Args:
      present, absent: unit image embeddings, conditioned on the row's class and its absent class.
      text: unit embeddings of the captions.
      present_logit, absent_logit: presence logits of the two.
      scale: inverse temperature of OITC, already exponentiated.
      harder: cosines of OITC's images with hard negative captions; see `softmax_contrastive`.
    """
    first = oitc(present, text, scale, rows, harder)
    others = absent if config.absent_rows else None
    second = oiic(present, rows, others, temperature=config.oiic_temperature)
    third = oid(present_logit, absent_logit)
    total = config.oitc * first + config.oiic * second + config.oid * third
    return Losses(total=total, oitc=first, oiic=second, oid=third)


def oitc(
    image: Float[Array, "M D"],
    text: Float[Array, "M D"],
    scale: Float[Array, ""],
    rows: RowLabels,
    harder: Float[Array, "M K"] | None = None,
) -> Float[Array, ""]:
    """Object-focused image-text contrast: symmetric InfoNCE of conditioned images and captions."""
    return softmax_contrastive(image, text, scale, ignore=same_meaning(rows), harder=harder)


def same_meaning(rows: RowLabels) -> Bool[Array, "M M"]:
    """Mask of pairs that are no negatives: same object of the same image, or same caption."""
    same = _equal(rows.image) & _equal(rows.label) | _equal(rows.caption)
    return same & ~jnp.eye(len(rows.image), dtype=bool)


def oiic(
    present: Float[Array, "M D"],
    rows: RowLabels,
    absent: Float[Array, "M D"] | None = None,
    *,
    temperature: float,
) -> Float[Array, ""]:
    """Object-focused image-image contrast: images conditioned on one class are positives.

    Other objects, those of the same image included, are negatives; so is every row conditioned on a
    class that is absent from its image. Rows of the same object in the same image count as neither.
    The loss is 0 where no row has a positive.

    Args:
      present, absent: unit rows; without `absent` only present rows compare.
      temperature: divides the cosines; see `LossConfig.oiic_temperature`.
    """
    present = present.astype(jnp.float32)
    own = present @ present.T / temperature
    same_class, same_image = _equal(rows.label), _equal(rows.image)
    others = jnp.where(same_class & same_image, -jnp.inf, own)
    if absent is not None:
        more = present @ absent.astype(jnp.float32).T / temperature
        others = jnp.concatenate([others, more], axis=1)
    positives = positive_pairs(rows)
    # A batch of a single object leaves a row nothing to compare with: log-sum-exp of nothing.
    normaliser = jax.nn.logsumexp(others, axis=1, keepdims=True)
    terms = jnp.where(positives, own - jnp.where(jnp.isfinite(normaliser), normaliser, 0.0), 0.0)
    count = positives.sum(axis=1)
    anchors = count > 0
    per_anchor = -terms.sum(axis=1) / jnp.maximum(count, 1)
    return jnp.where(anchors, per_anchor, 0.0).sum() / jnp.maximum(anchors.sum(), 1)


def positive_pairs(rows: RowLabels) -> Bool[Array, "M M"]:
    """Mask of pairs of the same class in different images."""
    return _equal(rows.label) & ~_equal(rows.image)


def oid(present_logit: Float[Array, " M"], absent_logit: Float[Array, " M"]) -> Float[Array, ""]:
    """Object-focused image discrimination: binary cross-entropy of the presence logits."""
    present, absent = (x.astype(jnp.float32) for x in (present_logit, absent_logit))
    return 0.5 * (jnp.mean(jax.nn.softplus(-present)) + jnp.mean(jax.nn.softplus(absent)))


def _equal(values: Int[Array, " M"]) -> Bool[Array, "M M"]:
    return values[:, None] == values[None]
