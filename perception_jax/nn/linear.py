"""Affine maps that compute in the dtype of their input. Letters: B batch, H W C image, P patches,
D width, V rows of a table, T tokens.

Flax's own `nnx.Linear` fixes the compute dtype when it is built; here the input decides, so one
model runs in float32 or bfloat16 and keeps float32 master weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from perception_jax.errors import ConfigError
from perception_jax.ops.sharding import constrain


class Linear(nnx.Module):
    """`x @ kernel + bias`; `kernel` is [in, out].

    Args:
      gain: of the initial kernel: outputs start with `gain` times the inputs' standard deviation.
    """

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = True, gain: float = 1.0, rngs: nnx.Rngs
    ):
        scale = gain * inputs**-0.5
        self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None

    def __call__(self, x: Float[Array, "*B inputs"]) -> Float[Array, "*B outputs"]:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def lookup(
    table: Float[Array, "V D"], ids: Int[Array, "B T"], dtype: np.typing.DTypeLike
) -> Float[Array, "B T D"]:
    """Looks up rows of an embedding table, vocabulary-parallel on a mesh.

    The table is gathered over "fsdp" as any other weight; over "tensor" it stays split by rows,
    each chip looks up its own and the results are summed.
    """
    table = constrain(table, "tensor")
    return constrain(table[constrain(ids, "batch")].astype(dtype), "batch")


class PatchEmbed(nnx.Module):
    """A convolution whose stride is its kernel size, without padding.

    Rows and columns that do not fill a patch are dropped, as a VALID convolution does (SigLIP at
    384 px with patch 14 relies on it). Kept as a matrix product over cut-out patches: equal to the
    convolution, and faster on CPU.
    """

    def __init__(self, patch: int, width: int, *, bias: bool, rngs: nnx.Rngs):
        self.patch = patch
        scale = (3 * patch * patch) ** -0.5
        kernel = jax.random.normal(rngs.params(), (patch, patch, 3, width))
        self.kernel = nnx.Param(scale * kernel)
        self.bias = nnx.Param(jnp.zeros((width,))) if bias else None

    def grid(self, pixels: Float[Array, "B H W 3"]) -> tuple[int, int]:
        """Rows and columns of patches.

        Raises:
          ConfigError: no floating-point images [B, H, W, 3], or smaller than one patch.
        """
        if pixels.shape[3:] != (3,) or not jnp.issubdtype(pixels.dtype, jnp.floating):
            raise ConfigError(
                "expected normalised images, floating-point numbers [images, height, width, 3], "
                f"found {pixels.dtype}{list(pixels.shape)}. The checkpoint's processor makes them."
            )
        height, width = pixels.shape[1:3]
        if min(height, width) < self.patch:
            raise ConfigError(
                f"expected images of at least one patch, {self.patch}×{self.patch} pixels, found "
                f"{height}×{width} (height × width). Resize them with the checkpoint's processor."
            )
        return height // self.patch, width // self.patch

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B P D"]:
        """Patches in row-major order (y slow, x fast)."""
        size = self.patch
        rows, columns = self.grid(pixels)
        x = pixels[:, : rows * size, : columns * size]
        x = x.reshape(x.shape[0], rows, size, columns, size, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], rows * columns, size * size * 3)
        kernel = self.kernel[...].reshape(size * size * 3, -1).astype(x.dtype)
        y = x @ kernel
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)
