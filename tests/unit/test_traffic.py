"""Bytes between devices, read from a compiled program: loops, groups, asynchronous pieces."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from perception_jax.shard import mesh as mesh_lib
from perception_jax.shard import traffic

LAYERS, ROWS, WIDTH = 5, 32, 24


def test_collectives_of_a_scanned_stack_count_once_per_layer():
    mesh = mesh_lib.make_mesh(1, 4, 2)
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))

    def run(weights, x):
        def layer(x, weight):
            weight = jax.lax.with_sharding_constraint(weight, PartitionSpec())  # gathered
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ weight), PartitionSpec("fsdp")), ()

        return jax.lax.scan(layer, x, weights)[0]

    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(run, in_shardings=(split, rows), out_shardings=rows)
            .lower(
                jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32),
                jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32),
            )
            .compile()
        )
    found = traffic.traffic(compiled, mesh.size)
    assert {item.kind for item in found} == {"all-gather"}
    assert all(item.times == LAYERS for item in found)
    # Each layer's kernel is gathered over "fsdp" and "tensor": all but a chip's eighth is received.
    kernel = WIDTH * WIDTH * 4
    assert sum(item.bytes for item in found) == LAYERS * kernel * (8 - 1) // 8
    assert traffic.by_kind(found) == {"all-gather": sum(item.bytes for item in found)}


HLO = pathlib.Path(__file__).parent / "hlo"
"""Texts of libtpu 0.0.52 for v5e, without kernels' settings; long tuples are `(...)`. `scan` is
whole: the gradient of 12 scanned layers `tanh(x @ w)` of width 4,096 on fsdp 8 × tensor 2.
`decoder` and `asynchronous` are parts of the training steps of `configs/text/llama7b.py:lora` on
v5e-16 and of `configs/clip/vit_b16.py` on v5e-256."""


def parsed(name: str, devices: int) -> dict[tuple[str, tuple[int, ...]], traffic.Traffic]:
    """The collectives of a text by kind and shape."""
    found = traffic.parse((HLO / f"{name}.txt").read_text(), devices)
    return {(item.kind, item.result.shape): item for item in found}


def test_a_fused_reduce_scatter_sends_each_part_once():
    """An all-reduce in the text, whose fusion cuts out the chip's part."""
    found = parsed("scan", 16)
    kernel, rows = 4096 * 2048 * 2, 128 * 4096 * 2
    forward, backward = ("all-gather", (1, 4096, 2048)), ("all-gather", (4096, 2048))
    scatter = ("reduce-scatter", (4096, 2048))
    assert {key: (found[key].group, found[key].times) for key in (forward, backward, scatter)} == {
        forward: (8, 12),
        backward: (8, 12),
        scatter: (8, 12),
    }
    assert all(found[key].bytes == 12 * kernel * 7 // 8 for key in (forward, backward, scatter))
    activations = found["all-reduce", (128, 4096)]
    assert (activations.group, activations.bytes) == (2, 12 * 2 * rows // 2)
    assert len(found) == 5


def test_loops_that_pass_a_weight_on_count_their_steps():
    """In 8 micro-batches × 32 layers a weight goes to 16 chips behind an attention kernel, whose
    settings have lines of their own: a piece before the loop, then 4 pieces in each of 4 turns."""
    piece = 11008 * 256 * 2
    listed = traffic.parse((HLO / "decoder.txt").read_text(), 16)
    moved = [item for item in listed if item.kind == "collective-permute"]
    assert sorted(item.times for item in moved) == [8 * 32, 8 * 32 * 16]
    assert sum(item.bytes for item in moved) == 8 * 32 * 17 * piece
    head = 32000 * 4096 * 2 * 15 // 16
    assert traffic.by_kind(listed)["all-gather"] == 2 * head


def test_an_asynchronous_collective_counts_where_it_begins():
    """It goes on in eight fusions of a loop of 12 turns, all with the collective in them."""
    found = parsed("asynchronous", 256)
    (gather,) = found.values()
    assert (gather.kind, gather.group, gather.times) == ("all-gather", 256, 1)
    assert gather.bytes == 256 * 2 * 49408 * 2 * 255 // 256


PROGRAM = """
HloModule example

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  %start = ((f32[2], f32[4]), (f32[8], f32[16])) all-gather-start(%x), replica_groups={{0,1,2,3}}
  %done = (f32[8], f32[16]) all-gather-done(%start)
  %total = f32[8]{0} all-reduce(%x), channel_id=3, replica_groups=[4,2]<=[8], to_apply=%add
  %again = f32[8]{0} all-reduce(%x), channel_id=3, replica_groups=[4,2]<=[8], to_apply=%add
  %two = (f32[8], f32[16]) all-to-all(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'b'}
  ROOT %moved = f32[8]{0} collective-permute(%total), channel_id=4, source_target_pairs={{0,1}}
}
"""


def test_groups_combined_collectives_and_clones():
    """Clones of a collective have its channel."""
    listed = traffic.parse(PROGRAM, 8)
    of_kind = {
        kind: [(item.group, item.times, item.bytes) for item in listed if item.kind == kind]
        for kind in traffic.by_kind(listed)
    }
    assert of_kind == {
        "all-gather": [(4, 1, 16 * 3), (4, 1, 8 * 3)],
        "all-reduce": [(2, 2, 2 * 2 * 8 * 4 // 2)],
        "all-to-all": [(4, 1, 16 * 3), (4, 1, 8 * 3)],
        "collective-permute": [(8, 1, 8 * 4)],
    }


def test_buffers_that_go_to_other_slices_are_counted():
    """As libtpu writes a program for several slices; the channels are counted anew."""
    send = (
        "  %sent = (f32[4,8]{1,0:T(8,128)}, u32[], token[]) send(%x, %after), channel_id=7, "
        "is_host_transfer=true, frontend_attributes={"
        '_xla_host_transfer_rendezvous="all-reduce.1_0",'
        '_xla_megascale_reduce_operation="SUM",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    lines = PROGRAM.replace("  ROOT %moved", f"{send}\n  ROOT %moved")
    within, across = (traffic.parse(text, 8, 4) for text in (PROGRAM, lines))
    (found,) = [item for item in across if item not in within]
    assert (found.kind, found.group, found.times, found.bytes) == ("all-reduce", 4, 1, 0)
    assert found.dcn_bytes == 4 * 8 * 4 * 2 * 3 // 4
    assert len(across) == len(within) + 1
    (found,) = [
        item
        for item in traffic.parse(lines.replace("ALL_REDUCE", "ALL_GATHER"), 8, 4)
        if item.dcn_bytes
    ]
    assert found.dcn_bytes == 4 * 8 * 4 * 3
