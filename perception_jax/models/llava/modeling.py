"""LLaVA: a language model that reads the tokens of images (Liu et al., arXiv 2304.08485).

Image towers give features of patches, a projector brings them to the width of the language model,
and they take the places of `IMAGE` in the ids. With two towers, features are added or interleaved
(arXiv 2401.06209, §4). Letters: B batch, M images of a row, H W image, P
features of an image, C their width, T tokens of an image, S tokens of a row, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num

from perception_jax.errors import ConfigError
from perception_jax.generate.model import IMAGE, LanguageOutput, check_places
from perception_jax.models import registry
from perception_jax.models.llama.modeling import Llama
from perception_jax.models.llava.config import LlavaConfig, tower_vision
from perception_jax.nn import stack
from perception_jax.nn.attention import KvCache
from perception_jax.nn.linear import Linear
from perception_jax.nn.mlp import gelu
from perception_jax.nn.taps import Taps
from perception_jax.ops.image import CLIP_MEAN, CLIP_STD, normalise
from perception_jax.ops.sharding import constrain


class Projector(nnx.Module):
    """Features to embeddings of the language model: linear layers with GELU between them.

    The initial values are those of PyTorch's `Linear`.
    """

    def __init__(self, depth: int, inputs: int, width: int, *, rngs: nnx.Rngs):
        self.depth = depth
        for k in range(depth):
            layer = Linear(width if k else inputs, width, rngs=rngs)
            bound = layer.kernel.shape[0] ** -0.5
            for name in ("kernel", "bias"):
                shape = getattr(layer, name).shape
                drawn = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
                setattr(layer, name, nnx.Param(drawn))
            setattr(self, f"fc{k + 1}", layer)

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B D"]:
        for k in range(self.depth):
            x = getattr(self, f"fc{k + 1}")(gelu(x) if k else x)
        return x


def added(
    ratio: float, first: Float[Array, "*B C"], second: Float[Array, "*B C"]
) -> Float[Array, "*B C"]:
    """The weighted sum of the features of two towers; `ratio` is the weight of the first."""
    return ratio * first + (1 - ratio) * second


def tower_features(
    config: LlavaConfig,
    towers: Sequence[nnx.Module | None],
    images: Num[Array | np.ndarray, "B M H W 3"],
    dtype: np.typing.DTypeLike,
) -> tuple[Float[Array, "B M P C"], ...]:
    """As `Llava.image_features`, of image towers without the rest; None for one to leave out."""
    pixels = constrain(_pixels(config, images, dtype), "batch")
    batch, count = pixels.shape[:2]
    pixels = pixels.reshape(batch * count, *pixels.shape[2:])
    found = []
    for tower, layer in zip(towers, config.layers, strict=False):
        if tower is None:
            continue
        state = tower(pixels, taps=Taps(hidden=(layer,)), depth=layer).hidden[0]
        state = state[:, tower.prefix :] if config.select_feature == "patch" else state
        found.append(constrain(state.reshape(batch, count, *state.shape[1:]), "batch"))
    return tuple(found)


def _pixels(
    config: LlavaConfig, images: Num[Array | np.ndarray, "B M H W 3"], dtype: np.typing.DTypeLike
) -> Float[Array, "B M H W 3"]:
    images = jnp.asarray(images)
    if images.dtype != jnp.uint8:
        return images
    own = config.towers[0]
    usual = registry.architecture_of(own).image_settings(own, "hf")
    mean, std = usual.get("mean", CLIP_MEAN), usual.get("std", CLIP_STD)
    return normalise(images, mean, std, np.dtype(dtype))


class Llava(nnx.Module):
    """A language model with images; see `models.hosts.Host`.

    Attributes:
      vision, second_vision: the image towers, the second None where there is one.
      projector, second_projector: of the towers; the second None unless features are interleaved.
      language: the language model.
    """

    def __init__(self, config: LlavaConfig, *, rngs: nnx.Rngs):
        self.config = config

        def tower(index: int) -> nnx.Module | None:
            if index >= len(config.towers):
                return None
            own = config.towers[index]
            return registry.architecture_of(own).build(own, rngs=rngs)

        def projector(index: int) -> Projector:
            inputs = tower_vision(config.towers[index]).width
            return Projector(config.projector_depth, inputs, config.language.width, rngs=rngs)

        self.vision = tower(0)
        self.second_vision = tower(1)
        self.projector = projector(0)
        self.second_projector = projector(1) if config.mixing == "interleaved" else None
        self.language = Llama(config.language, rngs=rngs)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.language.vocab_size

    @property
    def context(self) -> int:
        """Most tokens of a text, those of images included."""
        return self.language.context

    @property
    def tokens_per_image(self) -> int:
        """Tokens of an image in a text."""
        return self.config.tokens_per_image

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the cells of an image that `image_map` returns."""
        return self.config.grid

    @property
    def dtype(self) -> np.dtype:
        """Dtype of embeddings, in which the language model computes by default."""
        return self.language.token_embedding[...].dtype

    def image_features(
        self,
        images: Num[Array | np.ndarray, "B M H W 3"],
        dtype: np.typing.DTypeLike | None = None,
    ) -> tuple[Float[Array, "B M P C"], ...]:
        """Computes the features of images, one array for each tower.

        They depend on the towers alone, so that those of frozen towers can be computed once and
        kept. All towers get the pixels of the first one's normalisation.

        Args:
          images: uint8, or normalised.
          dtype: of the computation for uint8 images; None is `dtype` of the model.
        """
        dtype = self.dtype if dtype is None else dtype
        return tower_features(self.config, (self.vision, self.second_vision), images, dtype)

    def project(
        self, features: tuple[Float[Array | np.ndarray, "B M P _"], ...]
    ) -> Float[Array, "B M T D"]:
        """Mixes and projects features of images to their tokens.

        Raises:
          ConfigError: another number of arrays than of towers.
        """
        if len(features) != len(self.config.towers):
            raise ConfigError(
                f"LLaVA: expected the features of {len(self.config.towers)} image tower(s), found "
                f"{len(features)}."
            )
        first, *rest = (constrain(jnp.asarray(x, self.dtype), "batch") for x in features)
        if self.config.mixing == "single":
            tokens = self.projector(first)
        elif self.config.mixing == "additive":
            tokens = self.projector(added(self.config.mixing_ratio, first, rest[0]))
        else:
            both = jnp.stack([self.projector(first), self.second_projector(rest[0])], axis=3)
            tokens = both.reshape(*both.shape[:2], -1, both.shape[-1])
        return constrain(tokens, "batch")

    def image_tokens(self, images: Num[Array | np.ndarray, "B M H W 3"]) -> Float[Array, "B M T D"]:
        """Encodes images as tokens of the language model; see `image_features`."""
        return self.project(self.image_features(images))

    def embed(
        self,
        ids: Int[Array | np.ndarray, "B S"],
        image_tokens: Float[Array, "B M T D"] | None = None,
        dtype: np.typing.DTypeLike | None = None,
    ) -> Float[Array, "B S D"]:
        """Looks up the embeddings of token ids, and puts the tokens of images in their places.

        The k-th `IMAGE` of a row is token k % T of its image k // T. A row without one ignores its
        images.

        Args:
          ids: `IMAGE` for each token of an image.
          image_tokens: from `image_tokens`; None for texts alone.
          dtype: of the result; None is that of the embedding table.

        Raises:
          ConfigError: outside of a compiled function, an unknown id, or a row with another number
            of image tokens than whole images of its own; inside, embeddings are NaN for an unknown
            id and for tokens of more images than there are.
        """
        if image_tokens is None:
            return self.language.embed(ids, dtype)
        check_places(ids, *image_tokens.shape[1:3])
        ids = constrain(jnp.asarray(ids), "batch")
        own = ids == IMAGE
        texts = self.language.embed(jnp.where(own, 0, ids), dtype)
        batch, width = ids.shape[0], image_tokens.shape[-1]
        flat = constrain(image_tokens, "batch").reshape(batch, -1, width).astype(texts.dtype)
        # Mapped over rows, so that chips that split the batch exchange no tokens.
        picked = jax.vmap(lambda row, places: row.at[places].get(mode="fill", fill_value=jnp.nan))(
            flat, jnp.maximum(jnp.cumsum(own, axis=1) - 1, 0)
        )
        return constrain(jnp.where(own[..., None], picked, texts), "batch")

    def image_map(self, rows: Float[Array, "*B T"]) -> Float[Array, "*B rows columns"]:
        """Converts values of the tokens of an image to a map of its patches.

        Both towers' tokens of a patch are added; class tokens are left out.
        """
        if self.config.mixing == "interleaved":
            rows = rows.reshape(*rows.shape[:-1], -1, 2).sum(axis=-1)
        return rows[..., self.config.prefix :].reshape(*rows.shape[:-1], *self.grid)

    def logits(self, tokens: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Computes float32 logits of the next token from tokens after the final norm."""
        return self.language.logits(tokens)

    def with_whole_head(self) -> Llava:
        """As `Llama.with_whole_head`."""
        model = jax.tree.map(lambda leaf: leaf, self)
        model.language = self.language.with_whole_head()
        return model

    def empty_cache(
        self, batch: int, capacity: int, dtype: np.typing.DTypeLike | None = None
    ) -> KvCache:
        """As `Llama.empty_cache`."""
        return self.language.empty_cache(batch, capacity, dtype)

    def __call__(
        self,
        inputs: Int[Array | np.ndarray, "B S"] | Float[Array, "B S D"],
        mask: Bool[Array | np.ndarray, "B S"] | None = None,
        images: Num[Array | np.ndarray, "B M H W 3"] | None = None,
        *,
        image_tokens: Float[Array, "B M T D"] | None = None,
        segments: Int[Array | np.ndarray, "B S"] | None = None,
        positions: Int[Array | np.ndarray, "B S"] | None = None,
        cache: KvCache | None = None,
        taps: Taps | None = None,
        dtype: np.typing.DTypeLike | None = None,
        head: bool = True,
        remat: stack.Remat = False,
        key: Array | None = None,
    ) -> LanguageOutput:
        """Runs the model on token ids with images, or on embeddings.

        Args:
          inputs: ids with `IMAGE` for each token of an image, or embeddings.
          images: of each row, uint8 or normalised; None for texts alone, or with `image_tokens`.
          image_tokens: instead of `images`, e.g. from kept features.
          mask, segments, positions, cache, taps, dtype, head, remat, key: as of `Llama`; `taps`
            and `remat` are those of the language model.

        Raises:
          ConfigError: as `embed` and `Llama`; or images beside embeddings.
        """
        if inputs.ndim == 2:
            if images is not None:
                image_tokens = self.image_tokens(images)
            inputs = self.embed(inputs, image_tokens, dtype)
        elif images is not None or image_tokens is not None:
            raise ConfigError("LLaVA: expected ids with images, found embeddings; see `embed`.")
        return self.language(
            inputs,
            mask=mask,
            segments=segments,
            positions=positions,
            cache=cache,
            taps=taps,
            head=head,
            remat=remat,
            key=key,
        )
