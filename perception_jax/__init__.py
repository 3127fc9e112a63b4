"""Vision encoders for multimodal models in JAX.

    import perception_jax
    clip = perception_jax.load("scenes-clip")

Public names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from perception_jax import lazy
from perception_jax.version import __version__

if TYPE_CHECKING:
    from perception_jax.api import Loaded as Loaded
    from perception_jax.api import Processor as Processor
    from perception_jax.api import export as export
    from perception_jax.api import load as load

__getattr__, __dir__, _names = lazy.attach(
    __name__,
    {"api": ("Loaded", "Processor", "export", "load"), "errors": ("PerceptionError",)},
    submodules=(
        "data",
        "evals",
        "inference",
        "interop",
        "models",
        "nn",
        "ops",
        "shard",
        "systems",
        "train",
        "viz",
    ),
)
__all__ = ["__version__", *_names]
