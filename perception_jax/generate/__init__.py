"""Text generation on explicit state."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {"model": ("LanguageModel", "LanguageOutput")},
)
