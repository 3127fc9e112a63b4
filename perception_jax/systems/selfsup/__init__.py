"""Self-supervised training of image towers, after SimCLR, VICReg and VICRegL."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "data": ("TwoViews", "ViewData"),
        "evaluate": ("Concepts", "Probes"),
        "model": ("SelfSupervised",),
        "task": ("SelfSupConfig", "SelfSupTask"),
    },
)
