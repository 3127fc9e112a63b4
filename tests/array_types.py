"""Enforces annotations of the library's functions and dataclasses, sizes of arrays among them.

jaxtyping's import hook decorates them with `jaxtyping.jaxtyped`. To explain errors, its functions
bind their arguments to names and check them twice at each call, which took a tenth of the suite's
time. The decorator here checks the same in one call of beartype.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import beartype
import jaxtyping

T = TypeVar("T", bound=Callable)

_bound = jaxtyping.jaxtyped(typechecker=beartype.beartype)
_sizes = jaxtyping.jaxtyped("context")


def enforce(package: str) -> None:
    """Checks annotations at each call of functions of the package that are imported after this."""
    jaxtyping.jaxtyped = lambda *, typechecker: checked
    jaxtyping.install_import_hook(package, "beartype.beartype")


def checked(target: T) -> T:
    """The function, or the dataclass with an `__init__`, that checks its annotations.

    Calls raise an error of beartype for a value that is not of the annotated type, among them an
    array with a size that differs from another one of the same name in this call.
    """
    if inspect.isclass(target):
        if dataclasses.is_dataclass(target) and "__init__" in vars(target):
            target.__init__ = checked(target.__init__)
        return target
    if not target.__annotations__:
        return target
    if any("{" in str(hint) for hint in target.__annotations__.values()):
        return _bound(target)  # a size is the value of an argument

    typed = None  # a start of Python calls few of the functions that it imports

    @functools.wraps(target)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal typed
        if jaxtyping.config.jaxtyping_disable:
            return target(*args, **kwargs)
        if typed is None:
            typed = _typed(target)
        with _sizes:
            return typed(*args, **kwargs)

    return call


def _typed(target: T) -> T:
    target.__annotations__ = {
        name: _resolved(hint, target.__globals__) for name, hint in target.__annotations__.items()
    }
    return beartype.beartype(target)


def _resolved(text: Any, names: dict[str, Any]) -> Any:
    """The type that a text means; Any where only type checkers import what it names."""
    if not isinstance(text, str):
        return text
    try:
        return eval(text, names)
    except NameError:
        return Any
