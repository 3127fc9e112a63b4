"""Mesh sizes, path rules, the vote of several processes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from perception_jax.errors import ConfigError, TrainingError
from perception_jax.shard import distributed
from perception_jax.shard.mesh import (
    batch_sharding,
    batch_shards,
    check_batch,
    in_a_slice,
    make_mesh,
    over_slices,
)
from perception_jax.shard.rules import fsdp_largest_axis, place, shardings
from perception_jax.train.state import TrainState
from perception_jax.train.step import VOTE, Step, compile_step


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a TPU slice, as far as a mesh asks."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v9"
    core_on_chip: int = 0
    process_index: int = 0


def two_slices() -> list[Chip]:
    """2 × 4 chips each, those of both in turn."""
    return [
        Chip(id=8 * k + 2 * y + x, slice_index=k, coords=(x, y, 0))
        for y in range(4)
        for x in range(2)
        for k in range(2)
    ]


@pytest.mark.parametrize("sizes", [(2, 8, 1), (4, 2, 2), (2, 2, 4), (16, 1, 1)])
def test_only_replicas_go_from_slice_to_slice(sizes: tuple[int, int, int]):
    grid = over_slices(sizes, two_slices(), 2)
    assert grid.shape == sizes
    assert len({chip.id for chip in grid.ravel()}) == 16
    slices = np.vectorize(lambda chip: chip.slice_index)(grid)
    half = sizes[0] // 2
    assert (slices[:half] == 0).all()
    assert (slices[half:] == 1).all()


def test_a_mesh_that_splits_layers_over_slices_is_refused():
    message = (
        r"2 slices of 8 chips, and with mesh\.replica=1 mesh\.fsdp=8 mesh\.tensor=2 .*"
        r"mesh\.replica=2 mesh\.fsdp=4 mesh\.tensor=2\."
    )
    with pytest.raises(ConfigError, match=message):
        over_slices((1, 8, 2), two_slices(), 2)


@pytest.mark.parametrize(
    ("kind", "torus", "sizes"),
    [
        ("TPU v6 lite", (16, 16, 1), (4, 64, 1)),
        ("TPU v5", (4, 4, 4), (1, 32, 2)),
        ("TPU v5 lite", (16, 16, 1), (1, 128, 2)),
    ],
)
def test_every_kind_of_slice_takes_meshes_that_split_an_axis_of_its_torus(kind, torus, sizes):
    chips = [
        Chip(id=k, slice_index=0, coords=coords, device_kind=kind)
        for k, coords in enumerate(np.ndindex(*torus))
    ]
    grid = in_a_slice(sizes, chips)
    assert grid.shape == sizes
    assert len({chip.id for chip in grid.ravel()}) == len(chips)
    if sizes[2] > 1:  # what is split by "tensor" sends most
        pairs = grid.reshape(-1, 2)
        assert all(sum(np.abs(np.subtract(a.coords, b.coords))) == 1 for a, b in pairs)


def test_mesh_fills_the_open_axis_and_is_auto():
    mesh = make_mesh(replica=2, tensor=2)
    assert dict(mesh.shape) == {"replica": 2, "fsdp": 2, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert batch_shards(mesh) == 4
    batch = jax.device_put(jnp.arange(8), batch_sharding(mesh))
    assert batch.addressable_shards[0].data.shape == (2,)
    assert make_mesh(devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"replica": 3}, r"\(3\) must divide the number of devices \(8\).*fsdp=4 tensor=2"),
        ({"fsdp": 2}, r"\(2\) must equal the number of devices \(8\)"),
        ({"replica": -1}, "at most one -1"),
        ({"tensor": 0}, "must be positive"),
    ],
)
def test_mesh_refuses_sizes_that_do_not_fit(sizes: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=message):
        make_mesh(**sizes)


@pytest.mark.parametrize(
    ("sizes", "batch", "hosts", "fits"),
    [
        ((1, 8, 1), 4, 1, "mesh.replica=1 mesh.fsdp=4 mesh.tensor=2; .* multiple of 8"),
        ((2, 2, 2), 6, 1, "mesh.replica=1 mesh.fsdp=2 mesh.tensor=4; .* multiple of 4"),
        ((1, 8, 1), 8, 3, "the 3 hosts.* multiple of 24"),
    ],
)
def test_a_batch_that_the_mesh_does_not_divide_is_refused(sizes, batch, hosts, fits):
    mesh = make_mesh(*sizes)
    with pytest.raises(ConfigError, match=f"batch_size {batch} must be divisible.*{fits}"):
        check_batch(mesh, batch, hosts)
    check_batch(mesh, 24, 3)


def test_first_match_wins():
    mesh = make_mesh(replica=2, tensor=2)
    rules = (
        ("q_proj/kernel$", PartitionSpec(None, "fsdp", "tensor")),
        ("kernel$", PartitionSpec(("fsdp", "tensor"))),
        (".*", PartitionSpec()),
    )
    leaves = {
        "blocks/q_proj/kernel": shape(3, 4, 6),
        "head/kernel": shape(8, 3),
        "head/bias": shape(3),
    }
    placed = {path: s.spec for path, s in shardings(leaves, rules, mesh).items()}
    assert placed == {
        "blocks/q_proj/kernel": PartitionSpec(None, "fsdp", "tensor"),
        "head/kernel": PartitionSpec(("fsdp", "tensor")),
        "head/bias": PartitionSpec(),
    }


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (PartitionSpec(None, ("fsdp", "tensor"), None), "the leaf has only 2 axes"),
        (PartitionSpec("model"), "no axis 'model' .it has replica, fsdp, tensor"),
    ],
)
def test_rows_that_do_not_fit_are_named(spec: PartitionSpec, message: str):
    mesh = make_mesh(tensor=2)
    with pytest.raises(ConfigError, match=message):
        shardings({"a/kernel": shape(6, 16)}, [("kernel", spec)], mesh)


@pytest.mark.parametrize(
    ("sizes", "wanted", "found"),
    [
        # fsdp=4, tensor=2. The axis moves to another one that the row names ...
        ((6, 16), ("fsdp", "tensor"), (None, ("tensor", "fsdp"))),
        ((16, 5), ("fsdp", "tensor"), (("fsdp", "tensor"), None)),
        ((6, 12), ("fsdp", "tensor"), (None, "tensor")),  # ... if both divide it,
        ((7, 6, 8), (None, "fsdp", None), (None, None, None)),  # never to one that stays whole.
        ((3, 6, 7), (None, "fsdp", "tensor"), (None, "tensor", None)),
        ((6,), (("fsdp", "tensor"),), ("tensor",)),
        # 4 and 2 divide 12, their product does not.
        ((6, 12), (None, ("replica", "fsdp", "tensor")), (None, ("replica", "fsdp"))),
    ],
)
def test_a_mesh_that_does_not_divide_falls_back_and_says_so(sizes, wanted, found, caplog):
    mesh = make_mesh(tensor=2)
    leaves = {"a/kernel": shape(*sizes), "b": shape(8)}
    rules = [("kernel", PartitionSpec(*wanted)), ("b", PartitionSpec("fsdp"))]
    placement = place(leaves, rules, mesh)
    assert placement.shardings["a/kernel"].spec == PartitionSpec(*found)
    assert placement.fallbacks == {"a/kernel": PartitionSpec(*wanted)}
    assert shardings(leaves, rules, mesh) == placement.shardings
    assert "1 of 2 leaves" in caplog.text
    assert f"a/kernel: {PartitionSpec(*found)} instead of" in caplog.text


def test_every_unmatched_leaf_is_named():
    leaves = {"a/kernel": shape(8), "a/bias": shape(8), "b/scale": shape(8)}
    with pytest.raises(ConfigError, match=r"(?s)2 leaves.*a/bias \(8,\): no row.*b/scale"):
        shardings(leaves, [("kernel", PartitionSpec("fsdp"))], make_mesh())


def test_fsdp_largest_axis_takes_what_divides():
    mesh, spec = make_mesh(), fsdp_largest_axis(min_size=16)
    assert spec((3, 16, 24), mesh) == PartitionSpec(None, None, "fsdp")
    assert spec((3, 32, 25), mesh) == PartitionSpec(None, "fsdp")
    assert spec((7, 9), mesh) == PartitionSpec()  # nothing divides
    assert spec((8,), mesh) == PartitionSpec()  # too small


def test_votes_are_summed_inside_the_step():
    mesh = make_mesh(replica=2, tensor=2)
    ballots = distributed.Ballots(mesh, needed=True)
    state = TrainState(
        step=jnp.int32(0),
        trainable={"w": jnp.zeros(8)},
        frozen={},
        opt_state=(),
        ema=None,
        key=jnp.zeros(2, jnp.uint32),
    )

    def loss(trainable, frozen, batch, key):
        return batch["x"].mean() + trainable["w"].sum(), {}

    def plain(state, batch):
        return dataclasses.replace(state, step=state.step + 1), {"loss": batch["x"].mean()}

    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), state)
    batch = {"x": jax.device_put(jnp.ones(8), batch_sharding(mesh)), VOTE: ballots.cast(False)}
    unused = {"merge": lambda *_: None, "apply": lambda *_: None}
    step = Step(advance=plain, loss=loss, **unused)
    step = compile_step(step, state, everywhere, batch, mesh)
    for stop, votes in ((False, 0), (True, 8), (False, 0)):
        state, metrics = step.call(state, {**batch, VOTE: ballots.cast(stop)})
        assert int(metrics[VOTE]) == votes
        assert float(metrics["loss"]) == 1
    assert not distributed.Ballots(mesh).needed  # alone, a process decides at once


def test_distributed_start_is_only_on_request_or_on_several_tpu_hosts():
    assert not distributed.is_wanted({})
    assert not distributed.is_wanted({"TPU_WORKER_HOSTNAMES": "localhost"})
    assert distributed.is_wanted({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"})
    assert not distributed.is_wanted(
        {"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2", distributed.SWITCH: "0"}
    )
    assert distributed.is_wanted({distributed.SWITCH: "1"})
    assert distributed.initialize(False).devices == 8
    with pytest.raises(TrainingError, match=r"(?s)cannot join.*Start the same command on every"):
        distributed.initialize(True)  # too late: this process has used JAX already
