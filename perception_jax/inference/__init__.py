"""A model over many images: batches of one shape on a mesh, and folders of image files."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "batches": ("Batched", "divisible"),
        "images": ("ImageResult", "ImageRun"),
        "pairs": ("BatchedPairs", "ImageTextPairs"),
        "pixels": ("PixelsInMemory", "PixelsOfSource"),
    },
)
