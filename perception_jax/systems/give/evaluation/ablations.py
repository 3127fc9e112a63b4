"""The ablations of GiVE as data: a name and what it changes in a configuration.

Names and switches are this library's (the paper's own table could not be confirmed). Keys are
dotted paths: `losses` is `LossConfig`, `adapter` is `AdapterConfig` with the choice of layers,
`sampler` groups batches by class, `mask` keeps padding out of the adapters' attention,
`instruction` gives them the instruction at all. The frozen backbone is no row: every table has it
as "static".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from perception_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation:
    """One row of the ablation table.

    Attributes:
      name: short, for folders and command lines.
      title: for the table.
      overrides: dotted path of a setting and its value; empty for the full system.
    """

    name: str
    title: str
    overrides: Mapping[str, bool | float | str]


def _row(name: str, title: str, **overrides: bool | float | str) -> Ablation:
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return Ablation(name=name, title=title, overrides=MappingProxyType(dotted))


ABLATIONS = (
    _row("full", "everything"),
    _row("no_oitc", "without OITC", losses__oitc=0.0),
    _row("no_oiic", "without OIIC", losses__oiic=0.0),
    _row("no_oid", "without OID", losses__oid=0.0),
    _row(
        "oitc_unstructured",
        "OITC alone, random batches",
        losses__oiic=0.0,
        losses__oid=0.0,
        sampler__grouped=False,
    ),
    _row("no_absent_rows", "OIIC without absent rows", losses__absent_rows=False),
    _row("linear_connector", "one linear layer for the MLP", adapter__connector="linear"),
    _row("first_half", "adapters in the first half", adapter__layers="first half"),
    _row("last_half", "adapters in the last half", adapter__layers="last half"),
    _row("all_layers", "adapters in all layers", adapter__layers="all"),
    _row("tanh_gate", "tanh gate from zero", adapter__gate="tanh"),
    _row("no_mask", "padding not masked", mask=False),
    _row("no_instruction", "instruction-free", instruction=False),
)
"""Of the specification's list, the full system first."""


def ablation(name: str) -> Ablation:
    """The ablation of that name.

    Raises:
      ConfigError: there is none.
    """
    for row in ABLATIONS:
        if row.name == name:
            return row
    raise ConfigError(
        f"expected one of the ablations {', '.join(row.name for row in ABLATIONS)}, found {name!r}"
    )
