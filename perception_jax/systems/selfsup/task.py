"""Self-supervised training of an image tower: images and matched patches of two views.

The loss is SimCLR's NT-Xent (arXiv 2002.05709) or VICReg (arXiv 2105.04906). The patch term follows
VICRegL (arXiv 2210.01571, §3), with matches by location only. A record may have several images that
are hard to tell apart (mirror images, as the shifted instances of CSI, arXiv 2007.08176, §2.2, or
minimal pairs): each is a row of its own, and so a negative of the others.
Letters: B batch, N images of a record, R = B × N rows, S image side, P patches, K compared patches,
D width, E projected width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int, Shaped

from perception_jax.api import Loaded
from perception_jax.errors import ConfigError
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.shardings import SHARDINGS
from perception_jax.ops.image import normalise
from perception_jax.ops.losses import nt_xent, vicreg
from perception_jax.systems.selfsup.data import ViewData
from perception_jax.systems.selfsup.model import SelfSupervised
from perception_jax.train.task import Batch, Evaluator, Metrics

_TOWER = "tower/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfSupConfig:
    """Settings of the loss.

    Attributes:
      name: "nt_xent" (SimCLR) or "vicreg".
      temperature: of NT-Xent.
      invariance, variance, covariance: weights of VICReg's terms.
      dense: share of the patch term in the loss, in [0, 1]; the image term has the rest.
      patches: how many matched patches of each image the patch term compares, drawn anew at each
        step; 0 for all.
      projector: width of the projectors.
      remat: what the backward pass recomputes; see `nn.stack.REMAT`.
    """

    name: str = "vicreg"
    temperature: float = 0.2
    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0
    dense: float = 0.5
    patches: int = 0
    projector: int = 256
    remat: str = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.dense <= 1:
            raise ConfigError(f"SelfSupConfig.dense: expected 0 to 1, found {self.dense}.")
        if self.name not in ("nt_xent", "vicreg"):
            raise ConfigError(
                f"SelfSupConfig.name: expected 'nt_xent' or 'vicreg', found {self.name!r}."
            )
        if self.temperature <= 0:
            raise ConfigError(
                f"SelfSupConfig.temperature: expected more than 0, found {self.temperature}."
            )


class SelfSupTask:
    """Trains a DINOv2 tower and its projectors on two views of each image."""

    trainable = nnx.Param
    shardings = (*SHARDINGS, (r"projector/fc\d/kernel$", PartitionSpec("fsdp")))

    def __init__(
        self,
        config: SelfSupConfig,
        model: Dinov2Config,
        *,
        data: ViewData,
        evaluators: Callable[[], Mapping[str, Evaluator]] = dict,
        start: Loaded | None = None,
    ):
        """Reads no weights.

        Args:
          evaluators: makes what is measured; called when it is first needed.
          start: a tower to start from, without it from fresh parameters. Its projectors are fresh.

        Raises:
          ConfigError: the start is another model.
        """
        if start is not None and start.config != model:
            raise ConfigError(f"start: {start.name} is {start.config}, expected {model}.")
        self.config, self.model, self.data = config, model, data
        self._evaluators, self._start = evaluators, start

    def init(self, key: jax.Array) -> SelfSupervised:
        """The tower and its projectors with fresh parameters."""
        return SelfSupervised(self.model, self.config.projector, rngs=nnx.Rngs(params=key))

    def pretrained(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, Any]:
        """The weights of `start`, read from their files to their shards."""
        if self._start is None:
            return {}
        towers = {
            path.removeprefix(_TOWER): leaf
            for path, leaf in targets.items()
            if path.startswith(_TOWER)
        }
        return {f"{_TOWER}{path}": leaf for path, leaf in self._start.read(towers).items()}

    def loss(self, model: nnx.Module, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """The weighted loss; each term as a metric, those of patches with the prefix "patch_"."""
        return self.loss_of(model, self.features(model, batch, key))

    def features(self, model: nnx.Module, batch: Batch, key: jax.Array) -> Mapping[str, jax.Array]:
        """Projections of images [R, E] and of matched patches [B, K, E], of both views.

        The patches are those of the first image of each record: what another one shares with it,
        its patches have in common too.
        """
        processor, prefix = self.data.transform.processor, model.tower.prefix
        dtype = model.tower.position_embedding.dtype  # the trainer's compute dtype
        first = self._drawn(batch["match_mask"], key)
        places = {"image": first, "second_image": _taken(batch["match_index"], first)}
        found = {"match_mask": _taken(batch["match_mask"], first)}
        for name, place in places.items():
            rows, alike = batch[name].shape[:2]
            # Images of a record stay beside each other, so that no row leaves its chip.
            pixels = batch[name].reshape(rows * alike, *batch[name].shape[2:])
            pixels = normalise(pixels, processor.mean, processor.std, dtype)
            tokens = model.tower(pixels, remat=self.config.remat).tokens
            patches = _taken(tokens[::alike, prefix:], place[..., None])
            found[name] = model.image_projector(tokens[:, 0])
            found[f"{name}_patches"] = model.patch_projector(patches)
        return found

    def _drawn(self, mask: Bool[Array, "B P"], key: jax.Array) -> Int[Array, "B K"]:
        """The patches of the first view that the patch term compares, matched ones if there are."""
        rows, patches = mask.shape
        if not 0 < self.config.patches < patches:
            return jnp.broadcast_to(jnp.arange(patches), (rows, patches))
        order = jnp.where(mask, jax.random.uniform(key, mask.shape), -1.0)
        return jnp.argsort(order, axis=1, descending=True)[:, : self.config.patches]

    def loss_of(
        self, model: nnx.Module, features: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, Metrics]:
        """See `loss`."""
        del model
        # Images of a record are compared across views only: mirror images share the changes of a
        # view, and so do its patches, and would be more alike in it than two views of one.
        rows, patches = features["image"].shape[0], features["match_mask"]
        alike = rows // len(patches)
        owners = jnp.broadcast_to(jnp.arange(len(patches))[:, None], patches.shape)
        whole, terms = self._compared(
            features["image"], features["second_image"], groups=jnp.arange(rows) // alike
        )
        patches, patch_terms = self._compared(
            features["image_patches"], features["second_image_patches"], patches, owners
        )
        loss = (1 - self.config.dense) * whole + self.config.dense * patches
        return loss, terms | {f"patch_{name}": term for name, term in patch_terms.items()}

    def _compared(
        self,
        one: jax.Array,
        two: jax.Array,
        mask: jax.Array | None = None,
        groups: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of two views of images or of patches, and its terms."""
        if self.config.name == "nt_xent":
            terms = nt_xent(one, two, self.config.temperature, mask=mask, groups=groups)
            return terms["contrast"], terms
        terms = vicreg(one, two, mask=mask)
        return sum(getattr(self.config, name) * term for name, term in terms.items()), terms

    def datasets(self) -> Mapping[str, Iterable[Batch]]:
        """ "train": endless batches of two views."""
        return {"train": self.data.loader()}

    def batch_shapes(self) -> Sequence[Batch]:
        """The one shape of all batches."""
        rows, side, patches = self.data.batch_size, self.model.image_size, self.model.positions - 1
        image = jax.ShapeDtypeStruct((rows, self.data.transform.rows, side, side, 3), jnp.uint8)
        return [
            {
                "image": image,
                "second_image": image,
                "match_index": jax.ShapeDtypeStruct((rows, patches), jnp.int32),
                "match_mask": jax.ShapeDtypeStruct((rows, patches), jnp.bool_),
            }
        ]

    def evaluators(self) -> Mapping[str, Evaluator]:
        """Those that were given."""
        return self._evaluators()


def _taken(x: Shaped[Array, "B P ..."], places: Int[Array, "B K ..."]) -> Shaped[Array, "B K ..."]:
    return jnp.take_along_axis(x, places, axis=1)
