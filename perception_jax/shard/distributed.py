"""Start-up of several processes (one per host) as one JAX program.

Call `initialize` once, before anything asks JAX for devices, on every host. Data-loading worker
processes must never call it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import ipaddress
import json
import logging
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed as jax_distributed  # the service has no public client
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int32

from perception_jax.errors import PerceptionError, TrainingError

T = TypeVar("T")
"""Type of a result."""

SWITCH = "PERCEPTION_JAX_DISTRIBUTED"
"""Environment variable: "1" starts the distributed runtime, "0" disables it."""

TIMEOUT_SECONDS = 900.0
"""Seconds that `exchange` waits for the slowest process."""

_log = logging.getLogger(__name__)
_turns: collections.Counter[str] = collections.Counter()
_poll: Poll | None = None


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """Index of this process and its devices."""

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


def initialize(
    enabled: bool | None = None,
    *,
    timeout_seconds: int = 300,
    heartbeat_seconds: float = 60.0,
    **cluster: Any,
) -> ProcessInfo:
    """Joins the other hosts if configured, and logs the devices of this process.

    Args:
      enabled: True joins, False does not; None asks the variable `SWITCH`, then joins on a TPU
        slice with more than one host.
      timeout_seconds: how long to wait for the other hosts.
      heartbeat_seconds: without a sign of life, after which `shard.peers` takes a process for gone.
        JAX's own limit, at which it aborts, is 40 s more.
      cluster: of `jax.distributed.initialize`, where JAX cannot find them: `coordinator_address`,
        `num_processes`, `process_id`.

    Raises:
      TrainingError: there are no hosts to find, or JAX was used before this call. (Hosts that do
        not come in time end the process; the log then says what to do.)
    """
    wanted = is_wanted(os.environ) if enabled is None else enabled
    if wanted and not jax.distributed.is_initialized():
        _join(timeout_seconds, heartbeat_timeout_seconds=int(heartbeat_seconds) + 40, **cluster)
    info = ProcessInfo(
        index=jax.process_index(),
        count=jax.process_count(),
        local_devices=jax.local_device_count(),
        devices=jax.device_count(),
        device_kind=jax.devices()[0].device_kind,
    )
    _log.info("%s", info)
    return info


class Ballots:
    """Votes by which all processes decide at the same step, e.g. to stop.

    Signals reach hosts at different times; if each acted on its own, some would wait in a
    collective for hosts that have left. Each process puts its vote into the step that all of them
    run; the step sums them (`train.step.VOTE`), and every process reads the same sum. Calls of an
    evaluation do the same (`Poll`).
    """

    def __init__(self, mesh: Mesh, *, needed: bool | None = None) -> None:
        """`needed`: whether to vote; by default where there is more than one process."""
        self.needed = jax.process_count() > 1 if needed is None else needed
        self.mesh = mesh
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._made: dict[bool, jax.Array] = {}

    def cast(self, stop: bool) -> Int32[jax.Array, " devices"]:
        """Returns this process's vote once per device: 1 to stop, else 0."""
        if stop not in self._made:
            mine = np.full((1,), stop, np.int32)
            self._made[stop] = jax.make_array_from_callback(
                (self.mesh.size,), self._sharding, lambda _: mine
            )
        return self._made[stop]


@dataclasses.dataclass(frozen=True)
class Poll:
    """A question that the processes of a mesh answer in each call that they make together.

    Attributes:
      ballots: of the mesh.
      asked: whether this process wants to leave.
      error: raised on all processes after the same call, once one of them wants to leave.
    """

    ballots: Ballots
    asked: Callable[[], bool]
    error: type[BaseException]

    def cast(self) -> Int32[jax.Array, " devices"]:
        """This process's vote, see `Ballots.cast`."""
        return self.ballots.cast(self.asked())


@contextlib.contextmanager
def polling(poll: Poll) -> Iterator[None]:
    """Calls of `inference.batches` on the mesh vote meanwhile, if it spans several processes."""
    global _poll
    before, _poll = _poll, poll if poll.ballots.needed else None
    try:
        yield
    finally:
        _poll = before


def current_poll(mesh: Mesh | None) -> Poll | None:
    """The poll on this mesh, if one is held."""
    return _poll if _poll is not None and _poll.ballots.mesh == mesh else None


def exchange(subject: str, text: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> list[str]:
    """Returns the texts of all processes in the order of their indices.

    The texts go through the coordination service, not through the devices, so that this may run
    beside a computation. All processes must call this in the same order. The service forgets the
    texts of the call before the last one, which all have read.

    Args:
      subject: what the texts are; for messages.

    Raises:
      TrainingError: a process sent nothing in time.
    """
    count = jax.process_count()
    if count == 1:
        return [text]
    turn = _turns[subject]
    _turns[subject] += 1
    client = jax_distributed.global_state.client
    client.key_value_set(_key(subject, turn, jax.process_index()), text)
    if turn > 1:
        client.key_value_delete(_key(subject, turn - 2, jax.process_index()))
    end = time.monotonic() + timeout_seconds
    return [_receive(client, subject, turn, index, end) for index in range(count)]


def together(subject: str, action: Callable[[], T]) -> T:
    """Runs `action` on every process; if it fails on one, no process continues.

    Raises:
      PerceptionError: what `action` raised here.
      TrainingError: it succeeded here and failed on another process; the message is that one's.
    """
    try:
        result = action()
    except PerceptionError as error:
        exchange(subject, f"{type(error).__name__}: {error}")
        raise
    for index, message in enumerate(exchange(subject, "")):
        if message:
            raise TrainingError(f"process {index} of this run failed ({subject}): {message}")
    return result


def from_first(
    subject: str, action: Callable[[], str], *, timeout_seconds: float = TIMEOUT_SECONDS
) -> str:
    """Returns the text that `action` gives on process 0; the others do not run it but wait for it.

    Process 0 waits for nobody, and a process on its own just runs `action`.

    Args:
      subject: what the text is, the same for the same text; for messages.

    Raises:
      Exception: what `action` raised here.
      TrainingError: it failed on process 0, with the message, or gave nothing in time.
    """
    state = jax_distributed.global_state
    if state.client is None:
        return action()
    if state.process_id == 0:
        failed, text = "", ""
        try:
            text = action()
        except BaseException as error:
            failed = f"{type(error).__name__}: {error}"
            raise
        finally:
            answer = json.dumps([failed, text])
            state.client.key_value_set(_key(subject, 0, 0), answer, allow_overwrite=True)
        return text
    end = time.monotonic() + timeout_seconds
    failed, text = json.loads(_receive(state.client, subject, 0, 0, end))
    if failed:
        raise TrainingError(f"process 0 of this run failed ({subject}): {failed}")
    return text


def is_wanted(environment: Mapping[str, str]) -> bool:
    """Whether the environment asks for it: `SWITCH`, else more than one TPU host."""
    switch = environment.get(SWITCH, "")
    if switch in ("0", "1"):
        return switch == "1"
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return len([host for host in hosts.split(",") if host.strip()]) > 1


def _key(subject: str, turn: int, index: int) -> str:
    return f"perception_jax/{subject}/{turn}/{index}"


def _receive(client: Any, subject: str, turn: int, index: int, end: float) -> str:
    """The text of one process. Waits in short pieces, so that Ctrl-C is answered."""
    while True:
        try:
            return client.blocking_key_value_get(_key(subject, turn, index), 2000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise TrainingError(
                    f"the job's other processes cannot be reached ({subject}): {error}. Look at "
                    "the log of each process, then start the same command on all of them again."
                ) from error
            if time.monotonic() > end:
                raise TrainingError(
                    f"process {index} of {jax.process_count()} did not answer in time "
                    f"({subject}). See its log, then start the same command on all again."
                ) from error


def _join(timeout_seconds: int, **settings: Any) -> None:
    advice = (
        "Start the same command on every host (with gcloud: --worker=all), before anything else "
        f"uses JAX. To run on this host alone, set {SWITCH}=0."
    )

    def last_call() -> None:
        _log.error("%s After %d s JAX ends this process. %s", _presence(), timeout_seconds, advice)

    # JAX does not raise when the time is up, it aborts without saying who is missing.
    timer = threading.Timer(0.9 * timeout_seconds, last_call)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(initialization_timeout=timeout_seconds, **settings)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"this process cannot join the job's others: {error}\n{advice}"
        ) from error
    finally:
        timer.cancel()


def _presence() -> str:
    """Says who has come, while this process waits for all to have come."""
    state = jax_distributed.global_state
    if state.coordinator_address is None:
        return f"{socket.gethostname()} is still looking for the hosts of this job."
    own = f"Process {state.process_id} of {state.num_processes} on {socket.gethostname()}"
    address = state.coordinator_address
    host, _, port = address.rpartition(":")
    if state.process_id == 0:
        came = _connected(int(port))
        return (
            f"{own} is still waiting for the others: {len(came)} of {state.num_processes} have "
            f"come, itself included, from {', '.join(sorted(set(came))) or 'nowhere'}."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError as error:
        return f"{own} is still waiting for process 0, expected at {address}: {error}."
    return f"{own} is still waiting; process 0 at {address} is there, another one is missing."


def _connected(port: int) -> list[str]:
    """Addresses of the established connections to a port of this host, as Linux lists them."""
    found = []
    for table in ("tcp", "tcp6"):
        try:
            lines = pathlib.Path("/proc/net", table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, remote, state = line.split()[:4]
            if int(local.rpartition(":")[2], 16) == port and state == "01":
                found.append(_address(remote.rpartition(":")[0]))
    return found


def _address(digits: str) -> str:
    """An address from the kernel's notation: words of 32 bits, in the order of this processor."""
    words = [
        int(digits[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(digits), 8)
    ]
    address = ipaddress.ip_address(b"".join(words))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
