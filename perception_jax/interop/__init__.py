"""Weights in and out: name rules, streaming readers, load, export, verify.

A model's own table lives in `models/<arch>/params.py`; this room holds the language. Everything
loads lazily.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "AdapterFile": "adapters",
    "AdapterNames": "adapters",
    "save_adapters": "adapters",
    "open_checkpoint": "checkpoint_dir",
    "read_json": "checkpoint_dir",
    "export_params": "export",
    "LoadedParams": "load",
    "load_params": "load",
    "source_shapes": "binding",
    "KeyReport": "key_report",
    "Ignore": "rules",
    "Rename": "rules",
    "Rule": "rules",
    "RuleTable": "rules",
    "identity_table": "rules",
    "compare_outputs": "verify",
    "compare_params": "verify",
    "verify_roundtrip": "verify",
    "write_checkpoint": "writer",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
