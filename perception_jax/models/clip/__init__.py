"""CLIP (Radford et al., arXiv 2103.00020); see README.md in this folder."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "config": ("ClipConfig", "VisionConfig"),
        "modeling": ("Clip", "ClipVisionTower"),
    },
)
