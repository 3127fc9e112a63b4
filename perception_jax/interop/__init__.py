"""Conversion of weights: name rules, streaming readers, load, export, verify.

A model's own table is in `models/<arch>/params.py`; this package contains the language of rules.
"""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "adapters": ("AdapterFile", "AdapterNames", "save_adapters"),
        "binding": ("source_shapes",),
        "checkpoint_dir": ("open_checkpoint", "read_json"),
        "export": ("export_params",),
        "key_report": ("KeyReport",),
        "load": ("LoadedParams", "load_params"),
        "rules": ("Ignore", "Rename", "Rule", "RuleTable", "identity_table"),
        "verify": ("compare_outputs", "compare_params", "export_verified", "verify_roundtrip"),
        "writer": ("write_checkpoint",),
    },
)
