"""Maps of an image encoder, and how well texts fit an image."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__, {"predict": ("EncoderPrediction", "Explainer", "TextScore"), "picture": ("draw",)}
)
