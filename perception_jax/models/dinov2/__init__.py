"""DINOv2 (Oquab et al., arXiv 2304.07193); see README.md in this folder."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "config": ("Dinov2Config",),
        "modeling": ("Dinov2",),
    },
)
