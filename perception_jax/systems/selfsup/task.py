"""Self-supervised training of an image tower: VICReg on images and on matched patches.

VICReg: arXiv 2105.04906. The patch term follows VICRegL (arXiv 2210.01571, §3), with matches by
location only. Letters: B batch, S image side, P patches, D width, E projected width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from perception_jax.errors import ConfigError
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.shardings import SHARDINGS
from perception_jax.ops.image import normalise
from perception_jax.ops.losses import vicreg
from perception_jax.systems.selfsup.data import ViewData
from perception_jax.systems.selfsup.model import SelfSupervised
from perception_jax.train.task import Batch, Evaluator, Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfSupConfig:
    """Settings of the loss.

    Attributes:
      invariance, variance, covariance: weights of VICReg's terms.
      dense: share of the patch term in the loss, in [0, 1]; the image term has the rest.
      projector: width of the projectors.
      remat: what the backward pass recomputes; see `nn.stack.REMAT`.
    """

    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0
    dense: float = 0.5
    projector: int = 256
    remat: str = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.dense <= 1:
            raise ConfigError(f"SelfSupConfig.dense: expected 0 to 1, found {self.dense}.")


class SelfSupTask:
    """Trains a DINOv2 tower and its projectors on two views of each image."""

    trainable = nnx.Param
    shardings = (*SHARDINGS, (r"projector/fc\d/kernel$", PartitionSpec("fsdp", "tensor")))

    def __init__(
        self,
        config: SelfSupConfig,
        model: Dinov2Config,
        *,
        data: ViewData,
        evaluators: Callable[[], Mapping[str, Evaluator]] = dict,
    ):
        """Args: evaluators: makes what is measured; called when it is first needed."""
        self.config, self.model, self.data = config, model, data
        self._evaluators = evaluators

    def init(self, key: jax.Array) -> SelfSupervised:
        """The tower and its projectors with fresh parameters."""
        return SelfSupervised(self.model, self.config.projector, rngs=nnx.Rngs(params=key))

    def pretrained(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, Any]:
        """Nothing: trains from scratch."""
        return {}

    def loss(self, model: nnx.Module, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """The weighted loss; each term as a metric, those of patches with the prefix "patch_"."""
        return self.loss_of(model, self.features(model, batch, key))

    def features(self, model: nnx.Module, batch: Batch, key: jax.Array) -> Mapping[str, jax.Array]:
        """Projections of images [B, E] and of matched patches [B, P, E], of both views."""
        del key  # no dropout
        processor, prefix = self.data.transform.processor, model.tower.prefix
        dtype = model.tower.position_embedding.dtype  # the trainer's compute dtype
        found = {}
        for name in ("image", "second_image"):
            pixels = normalise(batch[name], processor.mean, processor.std, dtype)
            tokens = model.tower(pixels, remat=self.config.remat).tokens
            patches = tokens[:, prefix:]
            if name == "second_image":
                patches = jnp.take_along_axis(patches, batch["match_index"][..., None], axis=1)
            found[name] = model.image_projector(tokens[:, 0])
            found[f"{name}_patches"] = model.patch_projector(patches)
        return found | {"match_mask": batch["match_mask"]}

    def loss_of(
        self, model: nnx.Module, features: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, Metrics]:
        """See `loss`."""
        del model
        whole = vicreg(features["image"], features["second_image"])
        patches = vicreg(
            features["image_patches"],
            features["second_image_patches"],
            mask=features["match_mask"],
        )
        dense = self.config.dense
        loss = (1 - dense) * self._weighted(whole) + dense * self._weighted(patches)
        return loss, whole | {f"patch_{name}": term for name, term in patches.items()}

    def _weighted(self, terms: Mapping[str, jax.Array]) -> jax.Array:
        return sum(getattr(self.config, name) * term for name, term in terms.items())

    def datasets(self) -> Mapping[str, Iterable[Batch]]:
        """ "train": endless batches of two views."""
        return {"train": self.data.loader()}

    def batch_shapes(self) -> Sequence[Batch]:
        """The one shape of all batches."""
        rows, side, patches = self.data.batch_size, self.model.image_size, self.model.positions - 1
        image = jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8)
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
