"""One folder per architecture; `registry` lists them."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "architecture": ("Architecture", "Claim", "Elsewhere", "Files"),
        "hosts": ("Host", "image_attention"),
        "identify": ("Identified", "identify"),
        "paired": ("Backbone", "build_backbone"),
        "params": ("flatten", "unflatten"),
        "registry": ("architecture_of", "architectures", "register"),
    },
    submodules=("clip", "dinov2", "eva", "llama", "llava", "registry", "siglip"),
)
