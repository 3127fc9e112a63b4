"""Import and export of small checkpoints whose every number is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from perception_jax.errors import CheckpointError
from perception_jax.interop.checkpoint_dir import open_checkpoint
from perception_jax.interop.export import export_params
from perception_jax.interop.load import load_params
from perception_jax.interop.rules import (
    SPLIT_LINEAR,
    Constant,
    ExtraAxes,
    Ignore,
    Rule,
    RuleTable,
    identity_table,
    linear,
)
from perception_jax.interop.safetensors_io import write_safetensors
from perception_jax.interop.tensors import LazyTensor, TensorFiles, TensorSpec
from perception_jax.interop.verify import compare_outputs, compare_params, verify_roundtrip

TABLE = RuleTable(
    rules=(
        *linear("layers.{i}.fc", "blocks/fc"),
        Rule("layers.{i}.qkv", ("blocks/q", "blocks/k", "blocks/v"), SPLIT_LINEAR),
        Rule((), "blocks/k_bias", Constant(0.0)),
        Rule("pos", "position", ExtraAxes((0,))),
        Rule("shift", "shift", default=0.25),
        Rule("embed", "embed", copies=("head.weight",)),
    ),
    ignored=(Ignore("*.position_ids", "a range"),),
    buffers={"index": np.array([0, 1])},
)
ABSTRACT = {
    path: jax.ShapeDtypeStruct(shape, jnp.float32)
    for path, shape in {
        "blocks/fc/kernel": (8, 3, 16),
        "blocks/fc/bias": (8, 16),
        "blocks/q": (8, 4, 2),
        "blocks/k": (8, 4, 2),
        "blocks/v": (8, 4, 2),
        "blocks/k_bias": (8, 2),
        "position": (5, 4),
        "shift": (),
        "embed": (6, 4),
    }.items()
}


def checkpoint(dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    files = {"pos": rng.normal(size=(1, 5, 4)), "embed": rng.normal(size=(6, 4))}
    for i in range(8):
        files[f"layers.{i}.fc.weight"] = rng.normal(size=(16, 3))
        files[f"layers.{i}.fc.bias"] = rng.normal(size=(16,))
        files[f"layers.{i}.qkv"] = rng.normal(size=(6, 4))
    return {name: array.astype(dtype) for name, array in files.items()}


def exported(params) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.read() for tensor in export_params(TABLE, params)}


def test_every_leaf_is_what_the_rules_say():
    files = checkpoint()
    params = load_params(TABLE, files, ABSTRACT).params
    assert list(params) == list(ABSTRACT)
    for i in range(8):
        np.testing.assert_array_equal(
            params["blocks/fc/kernel"][i], files[f"layers.{i}.fc.weight"].T
        )
        np.testing.assert_array_equal(params["blocks/k"][i], files[f"layers.{i}.qkv"][2:4].T)
    np.testing.assert_array_equal(params["position"], files["pos"][0])
    assert params["shift"] == 0.25
    assert not params["blocks/k_bias"].any()


def test_the_report_accounts_for_every_name():
    files = checkpoint(np.float16)
    files |= {"head.weight": files["embed"], "a.position_ids": np.arange(3), "index": np.arange(2)}
    report = load_params(TABLE, files, ABSTRACT, dtype=jnp.float32).report
    assert (report.tensors, report.leaves) == (26, 9)
    assert report.parameters == 8 * (48 + 16 + 24 + 2) + 20 + 1 + 24
    assert report.nbytes == 4 * report.parameters
    assert report.ignored == {"a.position_ids": "a range"}
    assert report.defaults == {"shift": 0.25}
    assert report.constants == {"blocks/k_bias": 0.0}
    assert (report.buffers, report.copies) == (("index",), ("head.weight",))
    assert report.dtypes == {("float16", "float32"): 7}
    for words in ("float16 → float32: 7", "a.position_ids: a range", "shift = 0.25", "head.weight"):
        assert words in str(report)


def test_everything_that_does_not_fit_is_told_at_once():
    files = checkpoint()
    files["layers.3.fc.wieght"] = files.pop("layers.3.fc.weight")
    files["pos"] = files["pos"][0]
    files["stray"] = np.zeros(2, np.float32)
    files["head.weight"] = files["embed"] + 1
    files["index"] = np.array([1, 0])
    files["layers.0.qkv"] = files["layers.0.qkv"].astype(np.int64)
    with pytest.raises(CheckpointError) as caught:
        load_params(TABLE, files, ABSTRACT)
    for problem in (
        "missing layers.3.fc.weight (16, 3), for blocks/fc/kernel; did you mean layers.3.fc.wieg",
        "unknown stray (2,)",
        "pos has shape (5, 4), expected (1, 5, 4)",
        "head.weight differs from embed",
        "index differs from the configuration",
        "layers.0.qkv has dtype int64, expected floating-point numbers",
    ):
        assert problem in str(caught.value)


def test_a_default_needs_all_layers_absent():
    table = RuleTable(rules=(Rule("w.{i}", "w", default=1.0),))
    abstract = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    np.testing.assert_array_equal(load_params(table, {}, abstract).params["w"], np.ones((2, 3)))
    with pytest.raises(CheckpointError, match=r"missing w\.1"):
        load_params(table, {"w.0": np.zeros(3, np.float32)}, abstract)


@pytest.mark.parametrize(
    ("stored", "wanted", "loaded"),
    [
        (np.float16, None, np.float16),
        (ml_dtypes.bfloat16, None, ml_dtypes.bfloat16),
        (ml_dtypes.bfloat16, "float32", np.float32),
        (np.float32, "bfloat16", ml_dtypes.bfloat16),
        (np.float64, None, np.float32),
    ],
)
def test_dtypes(stored, wanted, loaded):
    files = checkpoint(stored)
    kernel = load_params(TABLE, files, ABSTRACT, dtype=wanted).params["blocks/fc/kernel"]
    assert kernel.dtype == loaded
    np.testing.assert_array_equal(kernel[5], files["layers.5.fc.weight"].T.astype(loaded))


def test_integers_keep_their_values_or_are_refused():
    table, abstract = identity_table(["n"]), {"n": jax.ShapeDtypeStruct((1,), jnp.int32)}
    assert load_params(table, {"n": np.array([2**31 - 1])}, abstract).params["n"] == 2**31 - 1
    with pytest.raises(CheckpointError, match="jax_enable_x64"):
        load_params(table, {"n": np.array([2**31])}, abstract)


class Recorder(TensorFiles):
    """Counts how much of each tensor is asked for."""

    def __init__(self, files):
        self.files, self.read = files, []
        self.specs = {name: TensorSpec(a.shape, a.dtype) for name, a in files.items()}

    def __getitem__(self, name):
        self.read.append(name)
        return self.files[name]


def test_leaves_are_born_on_their_shards():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharded, whole = (NamedSharding(mesh, PartitionSpec(*s)) for s in (("fsdp",), ()))
    files = checkpoint()
    places = {path: sharded if path.startswith("blocks") else whole for path in ABSTRACT}
    recorder = Recorder(files)
    params = load_params(TABLE, recorder, ABSTRACT, shardings=places).params
    assert all(params[path].sharding == places[path] for path in ABSTRACT)
    compare_params(load_params(TABLE, files, ABSTRACT).params, params)
    # Each device reads only its own layer, and a replicated leaf is read once.
    assert recorder.read.count("layers.3.fc.weight") == 1
    assert recorder.read.count("embed") == 1
    with pytest.raises(CheckpointError, match="sharding for every leaf"):
        load_params(TABLE, files, ABSTRACT, shardings={})


def test_a_cpu_device_adopts_the_buffer():
    """One copy in host memory, not two."""
    leaf = load_params(TABLE, checkpoint(), ABSTRACT).params["blocks/fc/kernel"]
    assert leaf.unsafe_buffer_pointer() % 64 == 0
    assert not np.asarray(leaf).flags.owndata


def test_export_is_the_inverse():
    files = checkpoint(ml_dtypes.bfloat16) | {"shift": np.array(3, ml_dtypes.bfloat16)}
    params = load_params(TABLE, files, ABSTRACT).params
    params["blocks/k_bias"] = params["blocks/k_bias"].astype(jnp.bfloat16)
    back = exported(params)
    assert back.keys() == files.keys() | {"index"}
    compare_params(files, {name: back[name] for name in files})


def test_export_refuses_what_the_layout_cannot_hold():
    params = load_params(TABLE, checkpoint(), ABSTRACT).params
    with pytest.raises(CheckpointError, match="blocks/k_bias"):
        exported(params | {"blocks/k_bias": jnp.ones((8, 2))})
    with pytest.raises(CheckpointError, match="one dtype"):
        exported(params | {"blocks/q": params["blocks/q"].astype(jnp.bfloat16)})
    with pytest.raises(CheckpointError, match="embed2 has no rule"):
        exported(params | {"embed2": params["embed"]})


def test_a_round_trip_is_verified_tensor_by_tensor(tmp_path):
    files = checkpoint(np.float16) | {"shift": np.array(1, np.float16)}
    files |= {"head.weight": files["embed"], "a.position_ids": np.arange(3)}
    loaded = load_params(TABLE, files, ABSTRACT, dtype="float32")
    tensors = list(export_params(TABLE, loaded.params))
    write_safetensors(tmp_path / "x.safetensors", tensors)
    result = verify_roundtrip(TABLE, files, tmp_path / "x.safetensors")
    assert (result.equal, result.cast) == (0, len(files) - 1)
    assert (result.dropped, result.added) == (("a.position_ids",), ("index",))

    wrong = dict(open_checkpoint(tmp_path / "x.safetensors"))
    wrong["pos"] = wrong["pos"].copy()
    wrong["pos"][0, 0, 0] += 1
    del wrong["shift"]
    with pytest.raises(CheckpointError, match=r"pos differs in 1 of 20(.|\n)*shift is missing"):
        verify_roundtrip(TABLE, files, wrong)


@pytest.mark.parametrize("layer", range(3))
def test_a_flipped_bit_in_any_layer_of_a_stack_is_noticed(tmp_path, layer):
    spec, path = TensorSpec((8,), np.dtype(np.float32)), tmp_path / "x.safetensors"
    tensors = [LazyTensor(f"w.{k}", spec, lambda: np.ones(8, np.float32)) for k in range(3)]
    write_safetensors(path, tensors)
    raw = bytearray(path.read_bytes())
    raw[-1 - (2 - layer) * spec.nbytes] ^= 1
    path.write_bytes(raw)
    table = RuleTable(rules=(Rule("w.{i}", "w"),))
    with pytest.raises(CheckpointError, match=rf"CRC-32 .*'w\.{layer}'"):
        load_params(table, open_checkpoint(path), {"w": jax.ShapeDtypeStruct((3, 8), jnp.float32)})


def test_outputs_are_compared_by_the_largest_difference():
    a = np.array([1.0, 2.0], np.float32)
    assert compare_outputs("logits", a, a + np.float32(0.5), tolerance=0.5) == 0.5
    for other in (a + np.float32(0.5), np.array([np.nan, 2], np.float32)):
        with pytest.raises(CheckpointError, match="logits"):
            compare_outputs("logits", a, other, tolerance=0.4)


def test_a_lazy_tensor_must_be_what_it_announces(tmp_path):
    spec = TensorSpec((2, 3), np.dtype(np.float32))
    tensor = LazyTensor("w", spec, lambda: np.zeros((3, 2), np.float32))
    with pytest.raises(CheckpointError, match="as announced"):
        write_safetensors(tmp_path / "x.safetensors", [tensor])
