"""Contrastive training of image and text towers, after CLIP and SigLIP."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "benchmark": ("Benchmark", "own_benchmark", "scenes_benchmark", "training_source"),
        "data": ("ContrastiveData",),
        "encode": ("Encoder",),
        "task": ("ContrastiveConfig", "ContrastiveTask", "SigmoidClip"),
    },
)
