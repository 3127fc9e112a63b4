"""Llama (Touvron et al., arXiv 2302.13971); see README.md in this folder."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "config": ("LlamaConfig",),
        "modeling": ("Llama",),
    },
)
