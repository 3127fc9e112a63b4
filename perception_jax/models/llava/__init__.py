"""LLaVA (Liu et al., arXiv 2304.08485, 2310.03744) with one or two image towers; see README.md."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "config": ("LlavaConfig",),
        "modeling": ("Llava",),
    },
)
