"""Writes the JobSet of a training run on a TPU slice of a GKE cluster.

    python -m launch.cloud.jobset --name=vit --slice=v5e-16 --image=IMAGE --claim=runs \
        --out=vit.yaml -- \
        python -m launch.train --config=configs/clip/scenes.py --workdir=/mnt/runs/vit

The words behind `--` run in the container on every host. `kubectl apply -f vit.yaml` starts them;
the JobSet starts them again after a preemption, until they exit with 0.
"""

from __future__ import annotations

import json
import pathlib
import re
import string

from absl import flags

from launch import common
from perception_jax.errors import ConfigError

TEMPLATE = pathlib.Path(__file__).with_name("jobset.yaml")
"""The JobSet with variables."""

_ACCELERATORS = {
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
"""GKE's names of TPU versions."""


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    flags.DEFINE_string("name", None, "Of the JobSet.", required=True, flag_values=values)
    flags.DEFINE_string("slice", None, "E.g. v5e-16.", required=True, flag_values=values)
    flags.DEFINE_string("image", None, "Container image.", required=True, flag_values=values)
    flags.DEFINE_string(
        "claim",
        None,
        "PersistentVolumeClaim that many pods can write to.",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_string("mount", "/mnt/runs", "Where pods see the claim.", flag_values=values)
    flags.DEFINE_bool("spot", False, "Takes nodes that may be preempted.", flag_values=values)
    flags.DEFINE_string("queue", None, "Kueue's LocalQueue, if used.", flag_values=values)
    flags.DEFINE_integer(
        "max_restarts", 20, "Restarts after failures, besides preemptions.", flag_values=values
    )
    flags.DEFINE_string("out", None, "File; standard output by default.", flag_values=values)


PROGRAM = common.Program(name="cloud.jobset", define=define_flags, rest=True)
"""The command line of this program."""


def run(parsed: common.Parsed) -> int:
    """Writes the JobSet."""
    from perception_jax.files import write_whole

    text = rendered(parsed.flags, parsed.rest)
    if parsed.flags.out is None:
        print(text, end="")
    else:
        write_whole(pathlib.Path(parsed.flags.out), text)
    return 0


def rendered(values: flags.FlagValues, command: tuple[str, ...]) -> str:
    """The JobSet as YAML.

    Raises:
      ConfigError: a slice or name that does not exist in GKE, or no command.
    """
    from perception_jax.shard import slices

    found = slices.find(values.slice)
    version, _, topology = found.topology.partition(":")
    # Pod names add "-slice-0-NUMBER-SUFFIX" and must stay within 63 characters.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", values.name):
        raise ConfigError(
            "--name: expected at most 40 lower-case letters, digits and dashes, first a letter, "
            f"found {values.name!r}."
        )
    if not command:
        raise ConfigError("expected the command that the pods run behind --, found none.")
    chips = _chips_per_host(version, found.chips)
    nodes = {
        "cloud.google.com/gke-tpu-accelerator": _ACCELERATORS[version],
        "cloud.google.com/gke-tpu-topology": topology,
        **({"cloud.google.com/gke-spot": "true"} if values.spot else {}),
    }
    variables = {
        "name": values.name,
        "labels": {"kueue.x-k8s.io/queue-name": values.queue} if values.queue else {},
        "max_restarts": values.max_restarts,
        "hosts": found.chips // chips,
        "chips": chips,
        "nodes": nodes,
        "image": values.image,
        "claim": values.claim,
        "mount": values.mount,
        "command": list(command),
    }
    # JSON is YAML, whatever a value contains.
    return string.Template(TEMPLATE.read_text()).substitute(
        {name: json.dumps(value) for name, value in variables.items()}
    )


def _chips_per_host(version: str, chips: int) -> int:
    """Hosts have four chips; the slices that fit into a smaller or larger machine have one host."""
    return chips if chips <= 4 or (chips == 8 and version != "v5p") else 4


if __name__ == "__main__":
    common.start(PROGRAM, run)
