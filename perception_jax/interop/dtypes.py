"""Names of floating-point dtypes that callers use: NumPy's, JAX's, torch's and short ones."""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np

from perception_jax.errors import ConfigError
from perception_jax.settings import shown

_FLOATS = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
}
_ALIASES = {
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp64": "float64",
    "f64": "float64",
    "double": "float64",
}
"""`float` and `double` as torch has them."""


def floating_dtype(value: Any, what: str = "dtype") -> np.dtype:
    """The dtype of model parameters that a name or object stands for.

    Args:
      value: a name ("bfloat16", "bf16", "torch.float16"), a NumPy, JAX or torch dtype.
      what: name of the argument, for messages.

    Raises:
      ConfigError: no floating-point dtype that models run in, or float64 without `jax_enable_x64`.
    """
    name = _name(value)
    found = _FLOATS.get(_ALIASES.get(name, name))
    if found is None:
        raise ConfigError(
            f"{what}: expected a floating-point dtype ({', '.join(_FLOATS)}, or short ones such as "
            f"'bf16' and 'fp16'), found {shown(value)}."
        )
    if found.itemsize == 8 and not jax.config.jax_enable_x64:
        raise ConfigError(
            f"{what}: float64 needs JAX's 64-bit mode, which is off. Take float32, or set "
            "jax_enable_x64 first."
        )
    return found


def _name(value: Any) -> str:
    if isinstance(value, str):
        return value.strip().lower().removeprefix("torch.").removeprefix("jnp.").removeprefix("np.")
    if value is float:
        return "float"
    if type(value).__module__ == "torch":  # torch.dtype, without an import of torch
        return str(value).removeprefix("torch.")
    try:
        return np.dtype(value).name
    except Exception:  # NumPy's own errors differ by type
        return ""
