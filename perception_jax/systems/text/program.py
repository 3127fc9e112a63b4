"""The program of language models for `launch`: plans of serving.

`config` is an `ml_collections.ConfigDict` as `configs/text/serve.py` makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

    from perception_jax.shard.slices import Slice
    from perception_jax.systems.text.serving import ServingPlan


def serving_plans(config: Any, found: Slice, devices: Sequence[jax.Device]) -> list[ServingPlan]:
    """Plans of the prefill and of a step of the decode loop, from shapes alone."""
    from perception_jax.shard.mesh import MeshConfig
    from perception_jax.systems.text.serving import Serving, model_config, serving_plans

    settings = Serving(
        batch_size=config.batch_size,
        prompt=config.prompt,
        context=config.context,
        dtype=config.dtype,
        int8=config.int8,
        mesh=MeshConfig(**config.mesh.to_dict()),
    )
    return serving_plans(model_config(config.model), settings, found, devices)
