"""Programs that do several things: which flags belong to which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.common import Program
from perception_jax.errors import ConfigError


def check_flags(
    program: Program,
    chosen: str,
    values: Mapping[str, Any],
    flags_of: Mapping[str, Sequence[str]],
) -> None:
    """Refuses flags that are of no use for what was chosen.

    Args:
      values: of all flags.
      flags_of: for each choice the flags that it takes, besides those that no choice names.

    Raises:
      ConfigError: another choice's flag has a value.
    """
    named = {name for names in flags_of.values() for name in names}
    for flag in program.flags:
        strange = flag.name in named and flag.name not in flags_of[chosen]
        if strange and values[flag.name] != flag.default:
            owners = [choice for choice, names in flags_of.items() if flag.name in names]
            raise ConfigError(
                f"--{flag.name} belongs to {', '.join(owners)}; {chosen} takes "
                f"{', '.join(f'--{name}' for name in flags_of[chosen])}."
            )
