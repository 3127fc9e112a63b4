"""Stacks of transformer blocks: one module with stacked leaves, run by `lax.scan`.

A part of a stack is a slice of its leaves, so computing only the layers needed costs nothing.
`engine` scans over layers of repeating kinds and knows nothing of transformers; `forward.run` calls
the steps of blocks and the inserts around them; `stacked` makes stacks; `layer` says what a layer
takes and returns.

Several rows of a context may belong to one example, e.g. an image that is conditioned on several
texts. Before its first insert a stack does not depend on the context, so that those layers are
computed once for each example: in the layer of the first insert that runs, each example is repeated
`Context.repeats` times, and from there on the batch has one row for each row of the context. The
result is that of repeated inputs. Layers before that point cannot be tapped then, and a stack whose
batch grows takes neither a cache nor a state.
"""

from perception_jax.nn.stack.engine import REMAT, Remat
from perception_jax.nn.stack.forward import StackOutput, run
from perception_jax.nn.stack.layer import Context, Insert, Layer, StackBlock, Step, StepOutput
from perception_jax.nn.stack.stacked import (
    Inserted,
    Mixed,
    Separate,
    base_of,
    depth_of,
    init,
    part,
    residual_gain,
    separate,
)

__all__ = [
    "REMAT",
    "Context",
    "Insert",
    "Inserted",
    "Layer",
    "Mixed",
    "Remat",
    "Separate",
    "StackBlock",
    "StackOutput",
    "Step",
    "StepOutput",
    "base_of",
    "depth_of",
    "init",
    "part",
    "residual_gain",
    "run",
    "separate",
]
