"""Multi-head attention: the functions, the layer, masks and the cache of keys and values.

`attend` computes the output, and `probabilities` recomputes softmax rows for taps only; both use
the same scores, so map mode and fast mode agree. `multi_head` is attention between projected
tokens, and `Attention` the layer with its projections.
"""

from perception_jax.nn.attention.cache import KvCache, LayerCache
from perception_jax.nn.attention.core import LONG, attend, probabilities, take_rows
from perception_jax.nn.attention.layer import Attention, AttentionOutput, multi_head
from perception_jax.nn.attention.mask import AnyMask, AttentionMask, Mask

__all__ = [
    "LONG",
    "AnyMask",
    "Attention",
    "AttentionMask",
    "AttentionOutput",
    "KvCache",
    "LayerCache",
    "Mask",
    "attend",
    "multi_head",
    "probabilities",
    "take_rows",
]
