"""Rotary position embeddings: interleaved or half-split pairs, shared or per example, several axes.

RoFormer, arXiv 2104.09864. Letters: B batch, T tokens, N heads, H head width, R channels that are
turned (at most H), A axes of positions.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from perception_jax.errors import ConfigError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rope:
    """Cosines and sines of a rotary position embedding.

    Attributes:
      cos, sin: float32, of all examples or of each; channels behind the R first are left alone.
      interleaved: whether a pair is two neighbours (RoFormer, EVA-02) or a channel of the first
        half with one of the second (GPT-NeoX, Llama) (static).
    """

    cos: Float[Array, "*B T R"]
    sin: Float[Array, "*B T R"]
    interleaved: bool = dataclasses.field(default=True, metadata={"static": True})

    def rotate(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """Applies the embedding: `x cos + rot(x) sin` in float32, rot([x0, x1, …]) = [-x1, x0, …]
        or by halves."""
        count = self.cos.shape[-1]
        if count < x.shape[-1]:
            turned = self.rotate(x[..., :count])
            return jnp.concatenate([turned, x[..., count:]], axis=-1)
        wide = x.astype(jnp.float32)
        cos, sin = self.cos[..., None, :], self.sin[..., None, :]
        if self.interleaved:
            pairs = wide.reshape(*x.shape[:-1], -1, 2)
            turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
            return (wide * cos + turned * sin).astype(x.dtype)
        # By halves, without an array of turned channels: whether XLA writes it to memory decides
        # which products become fused multiply-adds, so that a tap would change the last bits.
        first, second = jnp.split(wide, 2, axis=-1)
        (cos1, cos2), (sin1, sin2) = jnp.split(cos, 2, axis=-1), jnp.split(sin, 2, axis=-1)
        y = jnp.concatenate([first * cos1 - second * sin1, second * cos2 + first * sin2], axis=-1)
        return y.astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Longer wavelengths, for texts longer than those of pretraining.

    Without `context`, all wavelengths are multiplied by `factor` (position interpolation, arXiv
    2306.15595). With it, Llama 3.1's: those up to `context / high` stay, those from
    `context / low` on are multiplied, and between them the frequency is interpolated.

    Attributes:
      factor: at least 1.
      context: length of the texts of pretraining, tokens.
      low, high: numbers of turns within `context`; `low` is below `high`.
    """

    factor: float
    context: int | None = None
    low: float = 1.0
    high: float = 4.0

    def apply(self, bands: Float[np.ndarray, "pairs"]) -> Float[np.ndarray, "pairs"]:
        """Returns the scaled frequencies, radians a position."""
        if self.context is None:
            return bands / np.float32(self.factor)
        turns = self.context * bands / np.float32(2 * np.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return ((1 - kept) * bands / self.factor + kept * bands).astype(np.float32)


def rotary(
    positions: Num[Array, "*B T"],
    width: int,
    *,
    theta: float = 10000.0,
    interleaved: bool = False,
    scaling: RopeScaling | None = None,
) -> Rope:
    """Rotary embedding of a sequence.

    Args:
      positions: of all examples or of each.
      width: R, channels of a head that are turned; even.
      theta: base of the wavelengths.
      interleaved: see `Rope`.
      scaling: of the wavelengths; None has none.

    Raises:
      ConfigError: an odd width.
    """
    bands = _bands(width, theta)
    if scaling is not None:
        bands = scaling.apply(bands)
    return _rope(positions[..., None] * bands, interleaved)


def rotary_sections(
    positions: Num[Array, "*B T A"],
    sections: tuple[int, ...],
    *,
    theta: float = 10000.0,
    interleaved: bool = False,
) -> Rope:
    """Rotary embedding of positions on several axes, each of which rotates a section of one set of
    frequencies.

    Qwen2-VL's multimodal rotary embedding (arXiv 2409.12191, §2.1), whose axes are time, row and
    column.

    Args:
      positions: of each axis.
      sections: how many pairs of channels each axis turns, from the fastest on; R is twice their
        sum.
      theta, interleaved: see `rotary`.

    Raises:
      ConfigError: another number of sections than axes.
    """
    if len(sections) != positions.shape[-1]:
        raise ConfigError(
            f"rotary sections: expected one for each of {positions.shape[-1]} axes, found "
            f"{list(sections)}."
        )
    axis_of_pair = np.repeat(np.arange(len(sections)), sections)
    angles = positions[..., axis_of_pair] * _bands(2 * sum(sections), theta)
    return _rope(angles, interleaved)


def rotary_axes(
    positions: Num[Array, "*B T A"],
    width: int,
    *,
    theta: float = 10000.0,
    interleaved: bool = False,
) -> Rope:
    """Rotary embedding of positions on several axes, each with its own set of frequencies.

    The image towers of Qwen2-VL and Pixtral are such, with rows and columns.

    Args:
      positions: of each axis.
      width: R; a multiple of twice the number of axes.
      theta, interleaved: see `rotary`.

    Raises:
      ConfigError: another width.
    """
    axes = positions.shape[-1]
    if width % (2 * axes):
        raise ConfigError(
            f"rotary positions on {axes} axes: expected a width that {2 * axes} divides, found "
            f"{width}."
        )
    angles = positions[..., None] * _bands(width // axes, theta)
    return _rope(angles.reshape(*angles.shape[:-2], width // 2), interleaved)


def axial(
    grid: tuple[int, int], head_width: int, *, reference: tuple[int, int], prefix: int
) -> Rope:
    """Rotary embedding of a grid of patches, rows first, scaled to a reference grid.

    EVA-02's, arXiv 2303.11331; timm's `RotaryEmbeddingCat`.

    Args:
      grid: rows and columns.
      head_width: H, divisible by 4.
      reference: the grid on which the model was trained; other grids are stretched over it.
      prefix: tokens in front that are not turned.
    """
    bands = 10000.0 ** (-np.arange(head_width // 4) / (head_width // 4))
    rows, columns = (
        np.arange(count) / count * base for count, base in zip(grid, reference, strict=True)
    )
    y = np.repeat(rows, grid[1])[:, None] * bands
    x = np.tile(columns, grid[0])[:, None] * bands
    angles = np.repeat(np.concatenate([y, x], axis=1), 2, axis=1)
    angles = np.concatenate([np.zeros((prefix, head_width)), angles])
    return Rope(jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32))


def _bands(width: int, theta: float) -> Float[np.ndarray, "pairs"]:
    """Radians a position of each pair, fastest first, rounded to float32 as PyTorch code does."""
    if width % 2:
        raise ConfigError(f"rotary width: expected an even number of channels, found {width}.")
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)


def _rope(angles: Float[Array, "*B T pairs"], interleaved: bool) -> Rope:
    if interleaved:
        angles = jnp.repeat(angles, 2, axis=-1)
    else:
        angles = jnp.concatenate([angles, angles], axis=-1)
    return Rope(jnp.cos(angles), jnp.sin(angles), interleaved)
