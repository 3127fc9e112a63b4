"""Files made by torch itself, read without it: bit-equal tensors under the same names."""

from __future__ import annotations

import collections
import warnings

import ml_dtypes
import numpy as np
import pytest

from perception_jax.errors import CheckpointError
from perception_jax.interop.checkpoint_dir import open_checkpoint
from perception_jax.interop.torch_reader import open_torch

torch = pytest.importorskip("torch")

BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def assert_same(files, tensors):
    """Names, shapes, dtypes and bits."""
    assert set(files) == set(tensors)
    for name, tensor in tensors.items():
        array = files[name]
        files.check(name)
        assert array.shape == tuple(tensor.shape)
        assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
        item = array.dtype.itemsize
        expected = tensor.detach().contiguous().view(BITS[item]).numpy()
        np.testing.assert_array_equal(np.ascontiguousarray(array).view(f"u{item}"), expected)


def tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "f32": base,
        "f64": base.double(),
        "f16": base.half(),
        "bf16": base.bfloat16() / 3,
        "i64": torch.arange(-3, 3),
        "i32": torch.arange(3, dtype=torch.int32),
        "u8": torch.arange(3, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "f8": base.to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "shared": base[2],
        "expanded": torch.ones(1, 3).expand(2, 3),
        "parameter": torch.nn.Parameter(base + 1),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", ["", "state_dict", "model"])
def test_torch_save(tmp_path, zipped, wrap):
    path = tmp_path / "pytorch_model.bin"
    value = {wrap: tensors(), "epoch": 3, "loss": 0.5, "best": None} if wrap else tensors()
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    assert_same(open_checkpoint(tmp_path), tensors())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path, protocol):
    torch.save(tensors(), tmp_path / "x.pt", pickle_protocol=protocol)
    assert_same(open_torch(tmp_path / "x.pt"), tensors())


def test_a_module_and_its_optimizer(tmp_path):
    """An ordered dict with `_metadata`, beside tensors that are no weights."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    moments = {"exp_avg": torch.ones(4, 3), "step": torch.tensor(1.0)}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    state = {"optimizer": optimizer, "model": module.state_dict(), "device": torch.device("cpu")}
    torch.save(state, tmp_path / "x.pth")
    assert_same(open_torch(tmp_path / "x.pth"), module.state_dict())


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_containers_of_tensors(tmp_path, protocol, zipped):
    """Lists, tuples, dicts with numbers as keys, ordered and default dicts, inside one another."""
    a, b, c, d, e, f, g = (torch.arange(3.0) + k for k in range(7))
    layers = collections.defaultdict(list)
    layers["blocks"] += [a, {"w": b, "more": (c, [d])}]
    layers[7] = {0: e, 1: {2: f}}
    layers["head"] = g
    expected = {
        "blocks.0": a,
        "blocks.1.w": b,
        "blocks.1.more.0": c,
        "blocks.1.more.1.0": d,
        "7.0": e,
        "7.1.2": f,
        "head": g,
    }
    kept = {"epoch": 3, "milestones": collections.Counter([1, 1]), "lr": [0.1, (2, None)]}
    for value in (
        layers,
        collections.OrderedDict(layers),
        {"model": dict(layers), **kept},
        collections.defaultdict(dict, {"model": layers}),
        collections.defaultdict(collections.OrderedDict, {"state_dict": layers, 3: "x"}),
    ):
        path = tmp_path / "x.pth"
        arguments = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
        torch.save(value, path, **arguments)
        assert_same(open_torch(path), expected)
    for value, names in (
        ([a, (b, c)], ["0", "1.0", "1.1"]),
        ({0: a, 5: [b, c]}, ["0", "5.0", "5.1"]),
        ({"rng": [a], "teacher": {"w": b}}, ["w"]),  # a state dict comes before a list
    ):
        torch.save(value, path, **arguments)
        assert list(open_torch(path)) == names
    assert_same(open_torch(path, section="rng"), {"0": a})
    torch.save({0: a, "0": b}, path, **arguments)
    with pytest.raises(CheckpointError, match=r"one value for each name .* two for '0'"):
        open_torch(path)


def test_shards_with_an_index(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    text = str({"weight_map": names}).replace("'", '"')
    (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    assert_same(open_checkpoint(tmp_path), {"a": torch.ones(2), "b": torch.zeros(3)})


class Tower(torch.nn.Module):
    """Parameters, a buffer, layers in a list, and attributes that are no tensors."""

    def __init__(self):
        super().__init__()
        self.register_buffer("input_resolution", torch.tensor(224))
        self.logit_scale = torch.nn.Parameter(torch.tensor(4.6))
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(2)])
        self.sizes = [1, 2]
        self.name = "tower"
        self.ratio = 0.5

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x * self.logit_scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_torchscript_archives_give_their_state_dict(tmp_path, dtype):
    """The layout of OpenAI's CLIP files; the code inside is never looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of TorchScript
        module = torch.jit.script(Tower().to(dtype))
        module.save(str(tmp_path / "ViT.pt"))
    assert_same(open_torch(tmp_path / "ViT.pt"), module.state_dict())


def test_bfloat16_is_the_dtype_of_ml_dtypes(tmp_path):
    torch.save({"w": torch.ones(2).bfloat16()}, tmp_path / "x.pt")
    assert open_torch(tmp_path / "x.pt")["w"].dtype == ml_dtypes.bfloat16
