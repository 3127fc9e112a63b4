"""Start-up of several processes (one per host) as one JAX program.

Call `initialize` once, before anything asks JAX for devices, on every host. Data-loading worker
processes must never call it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perception_jax.errors import TrainingError
from perception_jax.shard import mesh as mesh_lib

SWITCH = "PERCEPTION_JAX_DISTRIBUTED"
"""Environment variable: "1" starts the distributed runtime, "0" never does."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """Which process this is and what it sees."""

    index: int
    count: int
    local_devices: int
    devices: int
    device_kind: str

    def __str__(self) -> str:
        return (
            f"process {self.index} of {self.count}: {self.local_devices} local of "
            f"{self.devices} {self.device_kind} devices"
        )


def initialize(enabled: bool | None = None, *, timeout_seconds: int = 300) -> ProcessInfo:
    """Joins the other hosts where that is asked for, and logs what this process sees.

    Args:
      enabled: True joins, False does not; None asks the variable `SWITCH`, then joins on a TPU
        slice with more than one host.
      timeout_seconds: how long to wait for the other hosts.

    Raises:
      TrainingError: there are no hosts to find, or JAX was used before this call. (Hosts that do
        not come in time end the process; the log then says what to do.)
    """
    wanted = is_wanted(os.environ) if enabled is None else enabled
    if wanted and not jax.distributed.is_initialized():
        _join(timeout_seconds)
    info = ProcessInfo(
        index=jax.process_index(),
        count=jax.process_count(),
        local_devices=jax.local_device_count(),
        devices=jax.device_count(),
        device_kind=jax.devices()[0].device_kind,
    )
    _log.info("%s", info)
    return info


class Agreement:
    """Lets all processes take the same decision at the same step: any process may ask for it.

    Signals reach hosts at different times; if each acted on its own, some would wait in a
    collective for hosts that have left. The vote runs on the devices behind the training step and
    is read one call later, so that nobody waits for it. A single process decides at once.
    """

    def __init__(self, mesh: Mesh, *, vote: bool | None = None) -> None:
        """`vote`: whether to vote; by default where there is more than one process."""
        self._vote = jax.process_count() > 1 if vote is None else vote
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.max, out_shardings=mesh_lib.replicated(mesh))
        self._devices = mesh.size
        self._pending: jax.Array | None = None

    def __call__(self, wish: bool) -> bool:
        """Every process must call this equally often; all get the same answer."""
        if not self._vote:
            return wish
        last, mine = self._pending, np.full((1,), wish, np.int32)
        votes = jax.make_array_from_callback((self._devices,), self._sharding, lambda _: mine)
        self._pending = self._any(votes)
        return last is not None and bool(last)


def is_wanted(environment: Mapping[str, str]) -> bool:
    """Whether the environment asks for it: `SWITCH`, else more than one TPU host."""
    switch = environment.get(SWITCH, "")
    if switch in ("0", "1"):
        return switch == "1"
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return len([host for host in hosts.split(",") if host.strip()]) > 1


def _join(timeout_seconds: int) -> None:
    advice = (
        "Start the same command on every host (with gcloud: --worker=all), before anything else "
        f"uses JAX. To run on this host alone, set {SWITCH}=0."
    )
    # XLA does not raise when the time is up, it aborts the process; so the advice comes before.
    last_call = threading.Timer(
        0.9 * timeout_seconds,
        _log.error,
        ["still waiting for other hosts of this job, up to %d s. %s", timeout_seconds, advice],
    )
    last_call.daemon = True
    last_call.start()
    try:
        jax.distributed.initialize(initialization_timeout=timeout_seconds)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"this process cannot join the job's others: {error}\n{advice}"
        ) from error
    finally:
        last_call.cancel()
