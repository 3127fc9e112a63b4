"""Weights in and out: name rules, streaming readers, load, export, verify.

A model's own table lives in `models/<arch>/params.py`; this room holds the language. Everything
loads lazily.
"""

from perception_jax.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".adapters": ("AdapterFile", "AdapterNames", "save_adapters"),
        ".checkpoint_dir": ("open_checkpoint", "read_json"),
        ".export": ("export_params",),
        ".load": ("LoadedParams", "load_params"),
        ".plan": ("source_shapes",),
        ".report": ("KeyReport",),
        ".rules": ("Ignore", "Rename", "Rule", "RuleTable", "identity_table"),
        ".verify": ("compare_outputs", "compare_params", "export_verified", "verify_roundtrip"),
        ".writer": ("write_checkpoint",),
    },
)
