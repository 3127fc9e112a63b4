"""SigLIP (Zhai et al., arXiv 2303.15343); see README.md in this folder."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "config": ("SiglipConfig", "SiglipVisionConfig"),
        "modeling": ("Siglip", "SiglipVisionTower"),
    },
)
