"""Devices: the mesh, path rules that place every leaf on it, distributed start-up, FLOPs."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "distributed": ("initialize",),
        "flops": ("count_flops", "gradient_flops", "peak_flops"),
        "mesh": ("MeshConfig", "batch_sharding", "make_mesh", "replicated"),
        "program": ("collectives", "results"),
        "rules": ("ShardingPlan", "fsdp_largest_axis", "place", "shardings"),
    },
    submodules=("distributed", "flops", "mesh", "program", "rules"),
)
