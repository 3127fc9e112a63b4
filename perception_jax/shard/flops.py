"""FLOPs of a function, counted on its jaxpr.

XLA's own cost analysis counts the body of a loop once, so a scanned stack of 24 layers looks like
one layer. Here a scan counts as often as it runs. Only matrix products and convolutions count,
as is usual for model FLOPs; a multiply-add is two. What rematerialisation computes a second time
counts a second time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "Tesla T4": 65e12,
    "Tesla V100": 125e12,
}
"""Dense bfloat16 (T4, V100: float16) FLOPs per second of one JAX device, from the makers' sheets;
a device is half a chip on v2, v3 and 7x."""


def peak_flops(device_kind: str) -> float | None:
    """The entry of `PEAK_FLOPS` for a `jax.Device.device_kind`; None if unknown (CPUs are)."""
    if device_kind in PEAK_FLOPS:
        return PEAK_FLOPS[device_kind]
    # GPUs name memory and form too: "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB".
    variants = (n for n in PEAK_FLOPS if device_kind.startswith((f"{n} ", f"{n}-")))
    return next((PEAK_FLOPS[n] for n in variants if not n.startswith("TPU")), None)


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Traces `function` on (abstract) arguments and counts, over all devices together.

    The body of a `while` loop counts once, of a `cond` the dearest branch.
    """
    return count_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def count_jaxpr(jaxpr: core.Jaxpr) -> int:
    """`count_flops` of a function already traced."""
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: core.JaxprEqn) -> int:
    name = equation.primitive.name
    if name == "dot_general":
        return _dot(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    inner = [count_jaxpr(jaxpr) for jaxpr in _inner(equation.params)]
    if name == "cond":
        return max(inner, default=0)
    return sum(inner) * (equation.params["length"] if name == "scan" else 1)


def _dot(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _convolution(equation: core.JaxprEqn) -> int:
    kernel = equation.invars[1].aval.shape
    out_axis = equation.params["dimension_numbers"].rhs_spec[0]
    per_output = math.prod(kernel) // kernel[out_axis]  # the kernel's own inputs: groups are out
    return 2 * math.prod(equation.outvars[0].aval.shape) * per_output


def _inner(parameters: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
