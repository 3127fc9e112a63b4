"""Config files: Python files that define `get_config(arg=None)` and, where they train,
`get_task(config, loaded=None)`.

A config file is imported like any other module, under its dotted name from the root of its
package, so that what it defines can be sent to data-loading worker processes.
"""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import sys
import types

import ml_collections

from perception_jax.errors import ConfigError


def split_spec(spec: str) -> tuple[pathlib.Path, str | None]:
    """`"configs/a.py:res=64"` → `(Path("configs/a.py"), "res=64")`; no argument gives None."""
    head, separator, tail = spec.partition(".py:")
    if not separator:
        return pathlib.Path(spec), None
    return pathlib.Path(f"{head}.py"), tail or None


def load_config_module(path: str | pathlib.Path) -> types.ModuleType:
    """Imports a config file.

    Raises:
      ConfigError: the file is missing, is not Python, has a name that another module bears, cannot
        be imported, or defines no `get_config`.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ConfigError(_missing(file))
    file = file.resolve()
    root, name = _module_name(file)
    if str(root) not in sys.path:
        sys.path.append(str(root))
    module = _import(file, name)
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(
            f"{path}: expected a function get_config(arg=None) that returns an "
            "ml_collections.ConfigDict, found none. configs/quickstart.py is an example."
        )
    return module


def build_config(
    module: types.ModuleType, arg: str | None, path: pathlib.Path
) -> ml_collections.ConfigDict:
    """Calls the file's `get_config`; raises `ConfigError` if it returns anything else."""
    config = module.get_config() if arg is None else module.get_config(arg)
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"{path}: get_config must return an ml_collections.ConfigDict, "
            f"found {type(config).__name__}."
        )
    return config


def _missing(file: pathlib.Path) -> str:
    siblings = sorted(p for p in file.parent.glob("*.py") if not p.name.startswith("_"))
    near = [str(p) for p in siblings if p.name != "common.py"][:8]
    found = f" That folder has: {', '.join(near)}." if near else ""
    return f"config file {file} does not exist (seen from {pathlib.Path.cwd()}).{found}"


def _module_name(file: pathlib.Path) -> tuple[pathlib.Path, str]:
    if file.suffix != ".py" or not file.stem.isidentifier():
        raise ConfigError(
            f"{file}: a config file is a Python module; its name must be a Python name ending in "
            ".py (letters, digits, underscores)."
        )
    root, parts = file.parent, [file.stem]
    while (root / "__init__.py").exists():
        parts.insert(0, root.name)
        root = root.parent
    return root, ".".join(parts)


def _import(file: pathlib.Path, name: str) -> types.ModuleType:
    try:
        module = importlib.import_module(name)
    except ConfigError:
        raise
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}:{error.lineno}: {error.msg}.") from error
    except ImportError as error:
        raise ConfigError(f"{file} cannot be imported: {error}.") from error
    found = getattr(module, "__file__", None)
    if found is None or pathlib.Path(found).resolve() != file:
        raise ConfigError(
            f"{file}: the module name {name!r} already belongs to {found or 'a built-in module'}; "
            "rename the config file."
        )
    return module
