"""Attention, gradient and feature maps over patches, for any image tower.

A tower with a class token is read at that token's attention row in one layer, a tower that pools by
attention (SigLIP) at the row of its pooling head. Only these rows are recorded, so memory grows
with the tokens, not with their square. Class token and registers are left out of all maps; images
need not be square.

Maps are float32 on the patch grid, [B, rows, columns], and come from the forward pass that gives
the embedding. Letters: B batch, H W image, N heads, P patches, T texts (or tokens of a row), D
width, E embedding width, K pairs of an image and a text.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.errors import ConfigError
from perception_jax.nn import stack
from perception_jax.nn.taps import Taps
from perception_jax.nn.towers import TowerOutput
from perception_jax.ops.losses import unit

CLASS_ROW = 0
"""Row of the class token."""
LAST_LAYER = -1
"""Index of the last layer."""

_SPREAD = (2.0, 98.0)
"""Percentiles of a component that become 0 and 1, so that a few odd patches do not dim the rest."""


@runtime_checkable
class Tower(Protocol):
    """Protocol of an image tower.

    Attributes:
      prefix: tokens before the patches, token 0 being the class token; 0 for a tower that pools by
        attention and has none.
    """

    prefix: int

    def __call__(self, pixels: Float[Array, "B H W 3"], *, taps: Taps | None) -> TowerOutput:
        """Encodes normalised pixels and records the values that `taps` requests."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextMaps:
    """Maps of images for texts.

    Attributes:
      output: of the tower, as without maps.
      attention: as `class_attention`.
      relevance: as `text_relevance`, for each text.
      gradient: as `pixel_gradient`, for each text.
    """

    output: TowerOutput
    attention: Float[Array, "B rows columns"]
    relevance: Float[Array, "T B rows columns"]
    gradient: Float[Array, "T B H W"]


def class_attention(
    tower: Tower, pixels: Float[Array, "B H W 3"], *, layer: int = LAST_LAYER
) -> Float[Array, "B rows columns"]:
    """Computes the attention of the class token (or the pooling head), averaged over heads.

    Raises:
      ConfigError: the tower has no such layer; a tower with a pooling head has only the last.
    """
    return _attention(tower(pixels, taps=_taps(tower, layer)))


def attention_source(tower: nnx.Module, *, layer: int = LAST_LAYER) -> str:
    """Names the token or head whose attention `class_attention` computes, in words."""
    if not tower.prefix:
        return "pooling head"
    depth = stack.depth_of(tower.blocks)
    return f"class token, layer {layer % depth + 1} of {depth}"


def text_relevance(
    tower: Tower,
    pixels: Float[Array, "B H W 3"],
    texts: Float[Array, "T E"],
    *,
    layer: int = LAST_LAYER,
) -> Float[Array, "K rows columns"]:
    """Relevance of patches for a text: attention × gradient of the cosine, positive part, mean
    over heads (Chefer et al., arXiv 2103.15679, eq. 5, for the one row that `class_attention`
    shows).

    Args:
      texts: one embedding for each image, of any length; or several for one image, or one for all
        images.

    Returns:
      A map for each pair of an image and its text.

    Raises:
      ConfigError: as `class_attention`; texts that are not [T, E], or another number of texts than
        of images where neither is 1.
    """
    taps = _taps(tower, layer)
    pixels = _paired(pixels, texts)

    def score(probe: Array) -> tuple[Array, TowerOutput]:
        out = tower(pixels, taps=_probed(taps, probe))
        return _cosine(out.embedding, texts), out

    gradient, out = jax.grad(score, has_aux=True)(_zero_probe(tower, pixels, taps))
    return _relevance(out, gradient)


def pixel_gradient(
    tower: Tower,
    pixels: Float[Array, "B H W 3"],
    texts: Float[Array, "T E"],
) -> Float[Array, "K H W"]:
    """Computes the norm over colours of the gradient of the cosine with a text, per pixel.

    Args:
      texts: as in `text_relevance`.

    Raises:
      ConfigError: texts that are not [T, E], or another number of texts than of images where
        neither is 1.
    """
    pixels = _paired(pixels, texts)

    def score(pixels: Array) -> Array:
        return _cosine(tower(pixels, taps=None).embedding, texts)

    return _length(jax.grad(score)(pixels))


def text_maps(
    tower: Tower,
    pixels: Float[Array, "B H W 3"],
    texts: Float[Array, "T E"],
    *,
    layer: int = LAST_LAYER,
) -> TextMaps:
    """Computes all maps of every image for every text: one forward pass, one backward pass per
    text.

    Args:
      texts: embeddings of any length; T may be 0.

    Raises:
      ConfigError: as `class_attention`; or texts that are not [T, E].
    """
    _check_texts(texts)
    taps = _taps(tower, layer)

    def embed(probe: Array, pixels: Array) -> tuple[Array, TowerOutput]:
        out = tower(pixels, taps=_probed(taps, probe))
        return out.embedding, out

    probe = _zero_probe(tower, pixels, taps)
    embedding, pull, out = jax.vjp(embed, probe, pixels, has_aux=True)

    def towards(text: Float[Array, "E"]) -> tuple[Array, Array]:
        to_probe, to_pixels = pull(jax.grad(_cosine)(embedding, text[None]))
        return _relevance(out, to_probe), _length(to_pixels)

    relevance, gradient = jax.lax.map(towards, texts)  # one at a time, for memory's sake
    return TextMaps(output=out, attention=_attention(out), relevance=relevance, gradient=gradient)


def patch_pca(
    patches: Float[Array, "B P D"], grid: tuple[int, int]
) -> Float[Array, "B rows columns 3"]:
    """Computes the first three principal components of all patches of the batch as colours in [0,
    1].

    One basis serves the whole batch, so equal colours mean similar patches in any of its images.
    Each component is scaled so that its 2nd to 98th percentile fills the channel and signed so
    that its largest weight is positive. A component that does not vary is 0.5.

    Args:
      patches: without class token and registers, e.g. `TowerOutput.patches`.
      grid: rows and columns, e.g. `TowerOutput.grid`.

    Raises:
      ConfigError: the patches do not fill the grid.
    """
    batch, count, width = patches.shape
    if grid[0] * grid[1] != count:
        raise ConfigError(
            f"expected {grid[0]} x {grid[1]} = {grid[0] * grid[1]} patches an image, found "
            f"{count}: leave out class token and registers (TowerOutput.patches)."
        )
    tokens = patches.astype(jnp.float32).reshape(batch * count, width)
    components = _principal(tokens)
    low, high = jnp.percentile(components, jnp.asarray(_SPREAD), axis=0)
    narrow = high <= low  # nearly all patches alike: the outliers are what there is to see
    low = jnp.where(narrow, components.min(axis=0), low)
    high = jnp.where(narrow, components.max(axis=0), high)
    varies = high > low
    scaled = jnp.clip((components - low) / jnp.where(varies, high - low, 1.0), 0.0, 1.0)
    return jnp.where(varies, scaled, 0.5).reshape(batch, *grid, 3)


def _principal(tokens: Float[Array, "M D"]) -> Float[Array, "M 3"]:
    """Coordinates along the three widest axes, each up to a factor; zeros where there is none."""
    centred = tokens - tokens.mean(axis=0)
    # Eigenvectors of the smaller of both products: on CPU five to ten times faster than an SVD.
    few = len(tokens) <= tokens.shape[1]
    a, b = (centred, centred.T) if few else (centred.T, centred)
    exact = jax.lax.Precision.HIGHEST
    strengths, vectors = jnp.linalg.eigh(jnp.matmul(a, b, precision=exact))
    strengths, vectors = strengths[:-4:-1], vectors[:, :-4:-1].T
    axes = jnp.matmul(vectors, centred, precision=exact) if few else vectors
    largest = jnp.take_along_axis(axes, jnp.abs(axes).argmax(axis=1, keepdims=True), axis=1)
    # Below these an axis is rounding noise: of the products, and of the mean's subtraction.
    floor = jnp.maximum(1e-6 * strengths[0], 1e-12 * jnp.sum(tokens * tokens))
    sign = jnp.where(strengths > floor, jnp.sign(largest[:, 0]), 0.0)
    found = jnp.matmul(centred, axes.T, precision=exact) * sign
    return jnp.pad(found, ((0, 0), (0, 3 - found.shape[1])))


def _taps(tower: Tower, layer: int) -> Taps:
    """Records the one attention row that decides what the tower's pooled token sees."""
    if tower.prefix > 0:
        return Taps(attention=(layer,), rows=jnp.array([CLASS_ROW]))
    if layer != LAST_LAYER:
        raise ConfigError(
            f"layer {layer}: this tower has no class token; what it pools is decided by one "
            f"attention behind the last layer. Leave the layer out, or give {LAST_LAYER}."
        )
    return Taps(pool=True)


def _probed(taps: Taps, probe: Float[Array, "B N T"]) -> Taps:
    return taps.with_pool_probe(probe) if taps.pool else taps.with_probes(probe[None, :, :, None])


def _row(out: TowerOutput) -> Float[Array, "B N T"]:
    return out.attention[0, :, :, 0] if out.pool_attention is None else out.pool_attention


def _zero_probe(tower: Tower, pixels: Float[Array, "B H W 3"], taps: Taps) -> Float[Array, "B N T"]:
    return jnp.zeros(jax.eval_shape(lambda: _row(tower(pixels, taps=taps))).shape)


def _attention(out: TowerOutput) -> Float[Array, "B rows columns"]:
    return _on_grid(_row(out), out)


def _relevance(out: TowerOutput, gradient: Float[Array, "B N T"]) -> Float[Array, "B rows columns"]:
    return _on_grid(jax.nn.relu(gradient * _row(out)), out)


def _on_grid(rows: Float[Array, "B N T"], out: TowerOutput) -> Float[Array, "B rows columns"]:
    """Mean over heads of what falls on patches."""
    patches = rows[:, :, out.prefix :].mean(axis=1)
    return patches.reshape(-1, *out.grid)


def _paired(pixels: Float[Array, "B H W 3"], texts: Float[Array, "T E"]) -> Float[Array, "K H W 3"]:
    """An image for each text, where there are several texts for one image."""
    _check_texts(texts)
    if len(pixels) == len(texts) or len(texts) == 1:
        return pixels
    if len(pixels) != 1 or len(texts) == 0:
        raise ConfigError(
            f"expected one text for each of {len(pixels)} images, one text for all, or several for "
            f"one image; found {len(texts)} texts. For every image with every text use `text_maps`."
        )
    return jnp.broadcast_to(pixels, (len(texts), *pixels.shape[1:]))


def _check_texts(texts: Float[Array, "T E"]) -> None:
    if texts.ndim != 2:
        raise ConfigError(
            f"expected embeddings of texts, [texts, channels], found an array {list(texts.shape)}; "
            "one text is texts[None]."
        )


def _cosine(embedding: Float[Array, "B E"], texts: Float[Array, "#B _"]) -> Float[Array, ""]:
    """Summed over images: their gradients do not mix."""
    if embedding.shape[1] != texts.shape[1]:
        raise ConfigError(
            f"expected texts of the images' {embedding.shape[1]} channels, found "
            f"{texts.shape[1]}: embeddings of another model?"
        )
    return jnp.sum(unit(embedding) * unit(texts))


def _length(gradient: Float[Array, "B H W 3"]) -> Float[Array, "B H W"]:
    return jnp.linalg.norm(gradient.astype(jnp.float32), axis=-1)
