"""The toy's checkpoints: Hugging Face's layout, the authors' file without settings, and ours."""

from __future__ import annotations

from jax.sharding import PartitionSpec as P

from perception_jax.interop.rules import Rule, RuleTable, linear
from perception_jax.models.architecture import Architecture, Shapes
from perception_jax.models.shardings import SHARDINGS
from tests.toy_model.config import ToyConfig
from tests.toy_model.modeling import Toy

TABLE = RuleTable(rules=(*linear("toy.colour", "linear"), Rule("toy.gain", "gain")))


def read_names(shapes: Shapes) -> tuple[str, ToyConfig] | None:
    """The authors publish images of 4 pixels only, so the tensors tell all of it."""
    gain = shapes.get("toy.gain")
    return gain and ("reference", ToyConfig(size=4, width=gain[0]))


ARCHITECTURES = (
    Architecture(
        name="toy",
        build=Toy,
        owns=lambda config: isinstance(config, ToyConfig),
        read_config={"hf": ToyConfig.from_hf},
        write_config={"hf": ToyConfig.to_hf, "reference": lambda _: None},
        tables={"hf": lambda _: TABLE, "reference": lambda _: TABLE},
        read_names=read_names,
        image_settings=lambda config, _: {"size": config.size, "mode": "squash"},
        shardings=(*SHARDINGS, (r"gain$", P("fsdp")), (r"linear/kernel$", P(None, "fsdp"))),
    ),
)
