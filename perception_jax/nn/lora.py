"""Low-rank adaptation (LoRA; Hu et al., arXiv 2106.09685) of the linear layers of a frozen model.

A `Linear` with LoRA keeps its path and its leaves and gains `lora/a` and `lora/b`, which are
`AdapterParam`s: what trains is selected by type. Layers of a stack get stacked leaves.

Letters: B batch, R rank.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.errors import ConfigError
from perception_jax.nn.adapters import AdapterParam
from perception_jax.nn.dropout import dropout
from perception_jax.nn.linear import Linear, product
from perception_jax.settings import Integer, Number, check, shown

Model = TypeVar("Model", bound=nnx.Module)
"""Type of a model."""

_RANK, _ALPHA, _RATE = Integer(1, 2**14), Number(above=0.0, high=1e6), Number(low=0.0, high=0.99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Settings of LoRA, as in PEFT's `adapter_config.json`.

    Attributes:
      rank: number of columns of `a` and rows of `b`.
      alpha: the term is multiplied by `alpha / rank`.
      dropout: rate on the term's input; needs a key, see `Layer.key`.
      rank_stabilized: multiply by `alpha / sqrt(rank)` instead (rsLoRA, arXiv 2312.03732).

    Raises:
      ConfigError: a value of another type or out of range.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rank_stabilized: bool = False

    def __post_init__(self):
        check(self.rank, _RANK, "LoraConfig.rank")
        check(self.alpha, _ALPHA, "LoraConfig.alpha")
        check(self.dropout, _RATE, "LoraConfig.dropout")

    @property
    def scale(self) -> float:
        """Factor on the low-rank term."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


class Lora(nnx.Module):
    """The low-rank term of a linear layer, `scale * (dropout(x) @ a) @ b`; zero at first.

    Args:
      shape: of the layer's kernel, [..., in, out]; leading axes are layers of a stack.
    """

    def __init__(self, shape: Sequence[int], config: LoraConfig, *, rngs: nnx.Rngs):
        *layers, inputs, outputs = shape
        bound = inputs**-0.5
        a = jax.random.uniform(
            rngs.params(), (*layers, inputs, config.rank), minval=-bound, maxval=bound
        )
        self.a = AdapterParam(a)
        self.b = AdapterParam(jnp.zeros((*layers, config.rank, outputs)))
        self.scale = config.scale
        self.dropout = config.dropout

    def __call__(
        self, x: Float[Array, "*B inputs"], key: Array | None = None
    ) -> Float[Array, "*B outputs"]:
        """Args: key: for dropout; None drops nothing."""
        x = dropout(x, self.dropout, key)
        low = product(x, self.a[...].astype(x.dtype))
        return product(low, self.b[...].astype(x.dtype)) * self.scale

    def delta(self) -> Float[Array, "*L inputs outputs"]:
        """The change of the kernel to which the term is equal, float32."""
        a, b = (leaf[...].astype(jnp.float32) for leaf in (self.a, self.b))
        return jnp.matmul(a, b, precision="highest") * self.scale


def linear_layers(model: nnx.Module) -> dict[str, Linear]:
    """Returns the linear layers of a model by path, e.g. `blocks/attention/q_proj`."""
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    }


def add_lora(model: Model, config: LoraConfig, layers: Sequence[str], *, rngs: nnx.Rngs) -> Model:
    """Returns a copy of a model with LoRA on some of its linear layers.

    Args:
      model: its leaves are shared with the copy; may be abstract under `nnx.eval_shape`.
      layers: regular expressions that match whole paths (see `linear_layers`), e.g.
        `(".*/attention/[qv]_proj",)`.

    Raises:
      ConfigError: an expression that matches no linear layer, or a layer that has LoRA already.
    """
    model = _copied(model)
    found = linear_layers(model)
    for pattern in layers:
        if not any(re.fullmatch(pattern, path) for path in found):
            raise ConfigError(
                f"LoRA: expected paths of linear layers, found {shown(pattern)}, which matches "
                f"none of {', '.join(list(found)[:8])}{', …' if len(found) > 8 else ''}."
            )
    for path, layer in found.items():
        if not any(re.fullmatch(pattern, path) for pattern in layers):
            continue
        if layer.lora is not None:
            raise ConfigError(
                f"LoRA: {path} has LoRA already; merge it first (`merge_lora`) or start from the "
                "model without."
            )
        layer.lora = Lora(layer.kernel.shape, config, rngs=rngs)
    return model


def merge_lora(model: Model) -> Model:
    """Returns a copy of a model whose kernels contain their LoRA terms, which are removed.

    Raises:
      ConfigError: no layer has LoRA.
    """
    model = _copied(model)
    for layer in _adapted(model):
        layer.kernel = nnx.Param(_shifted(layer.kernel[...], layer.lora, 1.0))
        layer.lora = None
    return model


def unmerge_lora(merged: Model, adapted: nnx.Module) -> Model:
    """Returns a copy of a merged model with the LoRA terms taken out of its kernels again.

    Kernels are those from before the merge up to rounding in their dtype; keep the model of
    before the merge where they have to be equal.

    Args:
      merged: from `merge_lora`.
      adapted: the model with LoRA that was merged.

    Raises:
      ConfigError: the models differ in their layers.
    """
    merged = _copied(merged)
    plain, layers = linear_layers(merged), linear_layers(adapted)
    if plain.keys() != layers.keys():
        raise ConfigError("LoRA: expected a merged model and the same model before, found others.")
    for path, layer in layers.items():
        if layer.lora is not None:
            plain[path].kernel = nnx.Param(_shifted(plain[path].kernel[...], layer.lora, -1.0))
            plain[path].lora = layer.lora
    return merged


def _adapted(model: nnx.Module) -> Iterator[Linear]:
    layers = [layer for layer in linear_layers(model).values() if layer.lora is not None]
    if not layers:
        raise ConfigError("LoRA: expected a model with LoRA on some linear layer, found none.")
    yield from layers


def _shifted(kernel: Array, lora: Lora, sign: float) -> Array:
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ConfigError(
            f"LoRA: expected a floating kernel to merge into, found {kernel.dtype}: merge before "
            "the model is quantized."
        )
    return (kernel.astype(jnp.float32) + sign * lora.delta()).astype(kernel.dtype)


def _copied(model: Model) -> Model:
    """The same leaves in new modules, so that changing the copy leaves the model as it is."""
    return jax.tree.map(lambda leaf: leaf, model)
