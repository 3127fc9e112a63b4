"""EVA-CLIP (Sun et al., arXiv 2303.15389); see README.md in this folder."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "config": ("EvaConfig", "EvaVisionConfig"),
        "modeling": ("Eva", "EvaVisionTower"),
    },
)
