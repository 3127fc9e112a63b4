"""Text generation on explicit state: append tokens, choose the next ones, any number of times.

`prefill`, `extend` and `decode` are pure functions for compiled programs; `Generator` calls them on
prompts of any lengths with a small set of shapes.
"""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "loop": ("Decoded", "decode"),
        "generator": ("Generated", "Generator", "Part", "reason_ended"),
        "model": ("IMAGE", "LanguageModel", "LanguageOutput"),
        "sampling": ("Sampling", "choose", "reshaped"),
        "state": ("Appended", "State", "extend", "prefill"),
        "stopping": ("StopStrings",),
    },
)
