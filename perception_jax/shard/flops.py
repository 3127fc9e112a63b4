"""FLOPs of a function and of its gradient, counted on the jaxpr.

XLA's own cost analysis counts the body of a loop once, so a scanned stack of 24 layers looks like
one layer. Here a scan counts as often as it runs. Only matrix products and convolutions count,
as is usual for model FLOPs; a multiply-add is two.

`count_flops` counts all that a function computes, also what rematerialisation computes a second
time: hardware FLOPs. `gradient_flops` counts what a gradient needs however little is kept in
memory: model FLOPs (Chowdhery et al., arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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


def gradient_flops(function: Callable[..., Any], trainable: Any, *arguments: Any) -> int:
    """FLOPs of `function` and of its gradient with respect to `trainable`, without recomputation.

    A product costs its own FLOPs forward, and backward the same once more for each operand that
    depends on `trainable` in a product that the result depends on: three times for a layer in the
    middle of a trained network, twice for its first layer, once in front of what trains.

    Args:
      function: takes `trainable` and the other arguments (arrays or shapes); gives a scalar, or a
        tuple of a scalar and further outputs, which cost their forward FLOPs only.
    """
    jaxpr = jax.make_jaxpr(function)(trainable, *arguments).jaxpr
    trained = len(jax.tree.leaves(trainable))
    depends = [k < trained for k in range(len(jaxpr.invars))]
    wanted = [k == 0 for k in range(len(jaxpr.outvars))]
    return count_jaxpr(jaxpr) + _backward(jaxpr, depends, wanted).flops


@dataclasses.dataclass(frozen=True)
class _Backward:
    """FLOPs of a backward pass, and the inputs to which it brings a gradient."""

    flops: int
    reached: list[bool]


def _depends(jaxpr: core.Jaxpr, inputs: Sequence[bool]) -> dict[core.Var, bool]:
    """Returns the variables with a derivative with respect to the marked inputs."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    for equation in jaxpr.eqns:
        given = [_marked(known, var) for var in equation.invars]
        found = _outputs_depend(equation, given)
        floating = (jnp.issubdtype(var.aval.dtype, jnp.inexact) for var in equation.outvars)
        known.update(zip(equation.outvars, map(operator.and_, found, floating), strict=True))
    return known


def _outputs_depend(equation: core.JaxprEqn, given: list[bool]) -> list[bool]:
    if equation.primitive.name == "stop_gradient":
        return [False]
    bodies = _bodies(equation)
    if not bodies:
        return [any(given)] * len(equation.outvars)
    first, carried = _carry(equation)
    while True:  # what one turn of a loop marks, the next turn is given
        inner = given[len(given) - len(bodies[0].invars) :]
        known = [_depends(body, inner) for body in bodies]
        found = [
            any(_marked(marks, body.outvars[k]) for marks, body in zip(known, bodies, strict=True))
            for k in range(len(equation.outvars))
        ]
        grown = [a or b for a, b in zip(given[first : first + carried], found, strict=False)]
        if grown == given[first : first + carried]:
            return found
        given = [*given[:first], *grown, *given[first + carried :]]


def _backward(jaxpr: core.Jaxpr, inputs: Sequence[bool], wanted: Sequence[bool]) -> _Backward:
    """The backward pass from the wanted outputs to the marked inputs."""
    known, total = _depends(jaxpr, inputs), 0
    reached = {
        var
        for var, needed in zip(jaxpr.outvars, wanted, strict=True)
        if needed and _marked(known, var)
    }
    for equation in reversed(jaxpr.eqns):
        asked = [var in reached and _marked(known, var) for var in equation.outvars]
        if not any(asked):
            continue
        given = [_marked(known, var) for var in equation.invars]
        part = _equation_backward(equation, given, asked)
        total += part.flops
        pairs = zip(equation.invars, part.reached, strict=True)
        reached |= {v for v, hit in pairs if hit and not isinstance(v, core.Literal)}
    return _Backward(total, [var in reached for var in jaxpr.invars])


def _equation_backward(equation: core.JaxprEqn, given: list[bool], asked: list[bool]) -> _Backward:
    bodies = _bodies(equation)
    if not bodies:
        return _Backward(_equation(equation) * sum(given), given)
    first, carried = _carry(equation)
    turns = equation.params["length"] if equation.primitive.name == "scan" else 1
    given = _fixed_point(equation, given)
    while True:
        inner = given[len(given) - len(bodies[0].invars) :]
        parts = [_backward(body, inner, asked) for body in bodies]
        hit = [any(flags) for flags in zip(*(part.reached for part in parts), strict=True)]
        hit = [False] * (len(given) - len(hit)) + hit
        grown = [a or b for a, b in zip(asked[:carried], hit[first : first + carried], strict=True)]
        if grown == asked[:carried]:
            return _Backward(turns * max(part.flops for part in parts), hit)
        asked = [*grown, *asked[carried:]]


def _fixed_point(equation: core.JaxprEqn, given: list[bool]) -> list[bool]:
    """The inputs of a loop's body that depend on what trains in any of its turns."""
    first, carried = _carry(equation)
    found = _outputs_depend(equation, given)[:carried]
    grown = [a or b for a, b in zip(given[first : first + carried], found, strict=True)]
    return [*given[:first], *grown, *given[first + carried :]]


def _bodies(equation: core.JaxprEqn) -> list[core.Jaxpr]:
    """The functions that an equation calls; a `while`'s condition has no derivative."""
    name = equation.primitive.name
    if name == "while":
        return [equation.params["body_jaxpr"].jaxpr]
    bodies = list(_inner(equation.params))
    # A scatter or a reduction carries a function of scalars, which is no call of its operands.
    return bodies if name == "scan" or all(_calls(equation, body) for body in bodies) else []


def _calls(equation: core.JaxprEqn, body: core.Jaxpr) -> bool:
    given = equation.invars[len(equation.invars) - len(body.invars) :]
    shapes = [var.aval.shape for var in (*given, *equation.outvars)]
    return shapes == [var.aval.shape for var in (*body.invars, *body.outvars)]


def _carry(equation: core.JaxprEqn) -> tuple[int, int]:
    """Returns the first input and the number of inputs of a loop's carry."""
    name, parameters = equation.primitive.name, equation.params
    if name == "scan":
        return parameters["num_consts"], parameters["num_carry"]
    if name == "while":
        return parameters["cond_nconsts"] + parameters["body_nconsts"], len(equation.outvars)
    return 0, 0


def _marked(known: Mapping[core.Var, bool], var: Any) -> bool:
    return not isinstance(var, core.Literal) and known.get(var, False)


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
