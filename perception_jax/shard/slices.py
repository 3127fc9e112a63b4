"""TPU slices by name: topology, memory, speed; and their devices, without the hardware.

`libtpu` compiles for a slice on any machine. Names are Google's: "v5e-16" has 16 chips, and
"v5p-128" has 64, as v5p names count cores; "2xv5e-256" are two slices, joined by the data-centre
network. Figures are from Cloud TPU's pages on each version.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re

import jax

from perception_jax.errors import ConfigError, did_you_mean

GIB = 2**30
"""Bytes of a GiB."""

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
"""Environment variables of a process that compiles for slices; set before JAX starts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """A slice of a TPU pod, or several equal ones. Speeds are peaks of one chip.

    Attributes:
      name: e.g. "v5e-16".
      topology: of one slice for `libtpu`, e.g. "v5e:4x4".
      chips: of all slices; each is one JAX device.
      hbm: bytes of memory of a chip that a program can use.
      flops: bfloat16 FLOPs per second.
      hbm_bandwidth: bytes per second.
      ici_bandwidth: bytes per second to the other chips, in one direction over all links.
      dcn_bandwidth: bytes per second to other slices, a chip's share of its pod's network.
      slices: how many.
    """

    name: str
    topology: str
    chips: int
    hbm: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    slices: int = 1


@dataclasses.dataclass(frozen=True)
class _Version:
    # What the compiler reports as available: the chip's memory without what the runtime keeps.
    hbm: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    topologies: dict[int, str]
    cores: int = 1


_FLAT = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
_CUBES = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
}
_VERSIONS = {
    "v5e": _Version(int(15.75 * GIB), 197e12, 819e9, 200e9, 3.125e9, _FLAT),
    "v6e": _Version(int(31.25 * GIB), 918e12, 1640e9, 400e9, 12.5e9, _FLAT),
    "v5p": _Version(int(95.74 * GIB), 459e12, 2765e9, 600e9, 6.25e9, _CUBES, cores=2),
}


def names() -> list[str]:
    """The names of all slices."""
    return [
        f"{version}-{chips * found.cores}"
        for version, found in _VERSIONS.items()
        for chips in found.topologies
    ]


def find(name: str) -> Slice:
    """Returns the slice of a name, or N slices of "NxNAME".

    Raises:
      ConfigError: there is none.
    """
    several = re.fullmatch(r"([1-9]\d*)x(.+)", name)
    slices, one = (int(several[1]), several[2]) if several else (1, name)
    version, _, size = one.partition("-")
    if one not in names():
        sizes = [other for other in names() if other.startswith(f"{version}-")]
        raise ConfigError(
            f"expected a TPU slice, found {name!r}{did_you_mean(one, names())} There are "
            f"{', '.join(sizes or names())}; 2x{names()[0]} are two slices."
        )
    found = _VERSIONS[version]
    chips = int(size) // found.cores
    return Slice(
        name=name,
        topology=f"{version}:{found.topologies[chips]}",
        chips=slices * chips,
        slices=slices,
        hbm=found.hbm,
        flops=found.flops,
        hbm_bandwidth=found.hbm_bandwidth,
        ici_bandwidth=found.ici_bandwidth,
        dcn_bandwidth=found.dcn_bandwidth,
    )


def devices(found: Slice) -> list[jax.Device]:
    """Returns a slice's devices to compile for; nothing runs on them.

    The process must have started with `ENVIRONMENT`.

    Raises:
      ConfigError: without `libtpu`, or in a process that may use other platforms.
    """
    from jax.experimental import topologies

    if any(os.environ.get(key) != value for key, value in ENVIRONMENT.items()):
        wanted = " ".join(f"{key}={value}" for key, value in ENVIRONMENT.items())
        raise ConfigError(f"compiling for a TPU slice needs a process of its own with {wanted}.")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "compiling for a TPU slice needs libtpu, which is not installed: `make tpu` installs "
            "it beside the packages, or `pip install libtpu==0.0.52`."
        )
    several = {"num_slices": found.slices} if found.slices > 1 else {}
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=found.topology, **several
    )
    return list(described.devices)
