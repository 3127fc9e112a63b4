"""MMVP (arXiv 2401.06209): images that one encoder confuses and another tells apart, and the
benchmarks made of them."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "embed": ("ImageEmbedder", "embed_images"),
        "embedding_files": ("Embeddings", "read_embeddings"),
        "encoders": ("ENCODERS", "PublishedEncoder", "open_encoder"),
        "mining": ("BlindPairs", "Miner", "Thresholds"),
        "vlm": ("VlmRun",),
    },
)
