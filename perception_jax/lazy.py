"""Lazy public names of packages: the module of a name is imported when the name is first used.

__getattr__, __dir__, __all__ = lazy.attach(__name__, {"norms": ("LayerNorm", "RmsNorm")})
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any


def attach(
    package: str, names: Mapping[str, Collection[str]], *, submodules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Makes `__getattr__`, `__dir__` and `__all__` of a package.

    Args:
      package: the package's `__name__`.
      names: public names by the module of the package that defines them.
      submodules: modules of the package that are public themselves.
    """
    module_of = {name: module for module, some in names.items() for name in some}
    public = sorted([*module_of, *submodules])

    def get(name: str) -> Any:
        if name in module_of:
            return getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: list(public), public
