"""Maps of an image encoder, and how well texts fit an image."""

from perception_jax.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {".predict": ("EncoderPrediction", "Explainer", "TextScore"), ".picture": ("draw",)}
)
