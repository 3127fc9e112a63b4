"""Bytes between devices, read from a compiled program: loops, groups, asynchronous pieces."""

from __future__ import annotations

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


PROGRAM = """
HloModule example

%condition (state: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(12)
  %state = (s32[], f32[8]) parameter(0)
  %index = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%index, %bound), direction=LT
}

%start (part: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %part = bf16[4,8] parameter(0)
  %gather.1 = bf16[16,8]{1,0} all-gather(%part), channel_id=7, replica_groups={{0,1,2,3},{4,5}}
  ROOT %both = (bf16[4,8], bf16[16,8]) custom-call(%gather.1), target="Start"
}

%done (part: bf16[4,8]) -> bf16[16,8] {
  %part = bf16[4,8] parameter(0)
  %gather.2 = bf16[16,8]{1,0} all-gather(%part), channel_id=7, replica_groups={{0,1,2,3},{4,5}}
  ROOT %whole = bf16[16,8] custom-call(%gather.2), target="Done"
}

%all-reduce-scatter.1 (input: f32[64]) -> f32[8] {
  %input = f32[64] parameter(0)
  %sum = f32[64]{0} all-reduce(%input), channel_id=9, replica_groups=mesh['a'=4,'b'=2] {'a','b'}
  ROOT %cut = f32[8] dynamic-slice(%sum)
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]) parameter(0)
  %begun = (bf16[4,8], bf16[16,8]) fusion(%state), kind=kCustom, calls=%start
  %ended = bf16[16,8] fusion(%begun), kind=kCustom, calls=%done
  %part = f32[8] fusion(%state), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[], f32[8]) tuple(%state, %part)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  %loop = (s32[], f32[8]) while(%x), condition=%condition, body=%body
  %total = f32[8]{0} all-reduce(%x), channel_id=3, replica_groups=[4,2]<=[8], to_apply=%add
  %two = (f32[8], f32[16]) all-to-all(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'b'}
  ROOT %moved = f32[8]{0} collective-permute(%total), channel_id=4, source_target_pairs={{0,1}}
}
"""


def test_the_text_of_a_tpu_program_is_read():
    """As libtpu writes it: no trip counts, asynchronous pieces, all-reduce-scatter fusions."""
    listed = traffic.parse(PROGRAM, 8)
    found = {item.kind: item for item in listed}
    gather, scatter = found["all-gather"], found["reduce-scatter"]
    assert (gather.group, gather.times, gather.bytes) == (4, 12, 12 * 16 * 8 * 2 * 3 // 4)
    assert (scatter.group, scatter.times, scatter.bytes) == (8, 12, 12 * 64 * 4 * 7 // 8)
    assert (found["all-reduce"].group, found["all-reduce"].bytes) == (2, 2 * 8 * 4 // 2)
    combined = [item for item in listed if item.kind == "all-to-all"]
    assert [(item.group, item.bytes) for item in combined] == [(4, 16 * 3), (4, 8 * 3)]
    assert (found["collective-permute"].times, found["collective-permute"].bytes) == (1, 8 * 4)


def test_buffers_that_go_to_other_slices_are_counted():
    """As libtpu writes a program for several slices; the channels are counted anew."""
    send = (
        "  %sent = (f32[4,8]{1,0:T(8,128)}, u32[], token[]) send(%x, %after), channel_id=7, "
        "is_host_transfer=true, frontend_attributes={"
        '_xla_host_transfer_rendezvous="all-reduce.1_0",'
        '_xla_megascale_reduce_operation="SUM",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    lines = PROGRAM.replace("  ROOT %next", f"{send}\n  ROOT %next")
    within, across = (traffic.parse(text, 8, 4) for text in (PROGRAM, lines))
    (found,) = [item for item in across if item not in within]
    assert (found.kind, found.group, found.times, found.bytes) == ("all-reduce", 4, 12, 0)
    assert found.dcn_bytes == 12 * 4 * 8 * 4 * 2 * 3 // 4
    assert len(across) == len(within) + 1
    (found,) = [
        item
        for item in traffic.parse(lines.replace("ALL_REDUCE", "ALL_GATHER"), 8, 4)
        if item.dcn_bytes
    ]
    assert found.dcn_bytes == 12 * 4 * 8 * 4 * 3
