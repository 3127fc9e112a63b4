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
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from perception_jax.errors import ConfigError
from perception_jax.ops.sharding import constrain, on_one_cpu


def product(
    x: Float[Array, "*B inputs"],
    kernel: Float[Array, "inputs outputs"],
    dtype: np.typing.DTypeLike | None = None,
) -> Float[Array, "*B outputs"]:
    """Multiplies the last axis of `x` with a matrix.

    On a CPU the other axes of `x` become one. The gradient of the kernel is then a product over
    one axis; over two, XLA for CPU first transposes them in memory, a fifth of a training step. On
    a TPU the same reshape would move the padding of tiles. Wide kernels have a gradient of their
    own there; see `_wide_product`.

    Args:
      dtype: of the output; None is that of `x`.
    """
    dtype = x.dtype if dtype is None else dtype
    if x.ndim < 3 or not on_one_cpu():
        return jnp.matmul(x, kernel, preferred_element_type=dtype)
    rows, (inputs, outputs) = x.reshape(-1, x.shape[-1]), kernel.shape
    if {x.dtype, kernel.dtype, jnp.dtype(dtype)} == {_FLOAT32} and outputs > inputs >= _WIDE:
        y = _wide_product(rows, kernel)
    else:
        y = jnp.matmul(rows, kernel, preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], outputs)


_FLOAT32 = jnp.dtype(jnp.float32)
_WIDE = 512
"""Inputs from which on `_wide_product` is faster; below 400 it is slower."""


@jax.custom_jvp
def _wide_product(
    x: Float[Array, "B inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "B outputs"]:
    """`x @ kernel`, whose kernel gradient is fast on a CPU.

    The gradient is `x.T @ g`. Given that, XLA for CPU reads `x` along its columns in a product that
    takes 1.5 to 2 times as long as others of its size where the kernel has more outputs than
    inputs. Here `x` is transposed in memory first; without the barrier XLA would undo that.
    """
    return jnp.matmul(x, kernel)


def _wide_product_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    parts = []
    if not isinstance(x_dot, SymbolicZero):
        parts.append(jnp.matmul(x_dot, kernel))
    if not isinstance(kernel_dot, SymbolicZero):
        columns = jax.lax.optimization_barrier(x.T)
        parts.append(jax.lax.dot_general(columns, kernel_dot, (((0,), (0,)), ((), ()))))
    return _wide_product(x, kernel), sum(parts)


_wide_product.defjvp(_wide_product_jvp, symbolic_zeros=True)


class Linear(nnx.Module):
    """`x @ kernel + bias`; `kernel` is [in, out].

    Two optional parts leave the paths of the others as they are: `lora`, a low-rank term that is
    added (`nn.lora`), and `scale`, one factor per output of an int8 kernel (`nn.int8`).

    Args:
      gain: of the initial kernel: outputs start with `gain` times the inputs' standard deviation.
    """

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = True, gain: float = 1.0, rngs: nnx.Rngs
    ):
        scale = gain * inputs**-0.5
        self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None
        self.scale: nnx.Param | None = nnx.data(None)
        self.lora: nnx.Module | None = nnx.data(None)

    def __call__(
        self,
        x: Float[Array, "*B inputs"],
        *,
        key: Array | None = None,
        dtype: np.typing.DTypeLike | None = None,
    ) -> Float[Array, "*B outputs"]:
        """Applies the layer.

        Args:
          key: for the dropout of `lora`; None drops nothing.
          dtype: of the output; None is that of `x`. float32 keeps the sums of bfloat16 products.
        """
        dtype = x.dtype if dtype is None else dtype
        kernel = self.kernel[...].astype(x.dtype)
        if self.scale is None:
            y = product(x, kernel, dtype)
        else:  # scaled before it is rounded
            y = (product(x, kernel, jnp.float32) * self.scale[...]).astype(dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(dtype)
        return y if self.lora is None else y + self.lora(x, key).astype(dtype)


def lookup(
    table: Float[Array, "V D"], ids: Int[Array, "B T"], dtype: np.typing.DTypeLike
) -> Float[Array, "B T D"]:
    """Looks up rows of an embedding table, vocabulary-parallel on a mesh.

    The table is gathered over "fsdp" as any other weight; over "tensor" it stays split by rows,
    each chip looks up its own and the results are summed. An id outside of the table gives NaN:
    a compiled function cannot raise; see `check_ids`.
    """
    table, ids = constrain(table, "tensor"), constrain(ids, "batch")
    known = (ids >= 0) & (ids < table.shape[0])
    return constrain(jnp.where(known[..., None], table[ids].astype(dtype), jnp.nan), "batch")


def check_ids(ids: Int[Array | np.ndarray, "B T"], rows: int, what: str) -> np.ndarray | None:
    """Checks token ids outside of compiled functions, where their values are known.

    Args:
      rows: of the embedding table.
      what: the model, for the message.

    Returns:
      The ids on the host; None in a compiled function, of arrays spread over processes, and
      without any id.

    Raises:
      ConfigError: an id that the table lacks.
    """
    if isinstance(ids, jax.core.Tracer) or not ids.size:
        return None
    if isinstance(ids, jax.Array) and not ids.is_fully_addressable:
        return None
    values = np.asarray(ids)
    if values.min() < 0 or values.max() >= rows:
        wrong = values[(values < 0) | (values >= rows)]
        raise ConfigError(
            f"{what}: expected ids of 0 to {rows - 1}, found {wrong[0]} (one of {wrong.size}). Do "
            "the ids come from this model's tokenizer?"
        )
    return values


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
        y = product(x, kernel)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)
