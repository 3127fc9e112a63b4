"""Functions on arrays, without parameters."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "image": ("normalise",),
        "losses": ("sigmoid_contrastive", "softmax_contrastive", "unit"),
        "next_token": ("NextTokenLoss", "group_weights", "next_token_loss"),
        "resize": ("bicubic",),
        "sharding": ("constrain", "constrain_batch", "gathered", "on_mesh"),
    },
)
