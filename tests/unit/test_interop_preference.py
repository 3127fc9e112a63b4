"""Which of several files in a folder is read, and what the report says of the others."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest

import perception_jax
from perception_jax.data.processors import ImageProcessor
from perception_jax.errors import CheckpointError
from perception_jax.interop.checkpoint_dir import find_weights, open_checkpoint
from perception_jax.interop.safetensors_io import write_safetensors
from perception_jax.interop.tensors import LazyTensor, TensorSpec
from tests import torch_files
from tests.toy_model.config import ToyConfig

SETTINGS = ToyConfig(size=4, width=8).to_hf()


@pytest.fixture(autouse=True)
def toy(monkeypatch) -> None:
    from perception_jax.models import registry

    monkeypatch.setattr(registry, "MODULES", ["tests.toy_model.architecture"])


def tensors(gain: float) -> dict[str, np.ndarray]:
    return {
        "toy.colour.weight": np.ones((8, 3), np.float32),
        "toy.colour.bias": np.zeros(8, np.float32),
        "toy.gain": np.full(8, gain, np.float32),
    }


def save(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    specs = {name: TensorSpec(a.shape, a.dtype) for name, a in arrays.items()}
    write_safetensors(path, [LazyTensor(n, specs[n], lambda n=n: arrays[n]) for n in arrays])


def gain(folder: pathlib.Path, **arguments) -> tuple[float, perception_jax.Loaded]:
    loaded = perception_jax.load(folder, **arguments)
    return float(loaded.model.gain[0]), loaded


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A folder with nothing but settings."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SETTINGS))
    return tmp_path / "model"


def shards(folder: pathlib.Path, value: float, *, names=("a.safetensors", "b.safetensors")) -> None:
    arrays = tensors(value)
    parts = dict(zip(names, ([*arrays][:2], [*arrays][2:]), strict=True))
    for name, part in parts.items():
        save(folder / name, {key: arrays[key] for key in part})
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_single_file_comes_before_an_index_and_both_before_torch_files(folder):
    torch_files.save(folder / "pytorch_model.bin", tensors(1.0))
    assert gain(folder)[0] == 1.0
    shards(folder, 2.0)
    value, loaded = gain(folder)
    assert value == 2.0
    assert set(loaded.report.left) == {"pytorch_model.bin"}
    save(folder / "model.safetensors", tensors(3.0))
    value, loaded = gain(folder)
    assert value == 3.0
    assert set(loaded.report.left) == {
        *("a.safetensors", "b.safetensors"),
        *("model.safetensors.index.json", "pytorch_model.bin"),
    }
    assert loaded.report.read["weights"] == str(folder / "model.safetensors")
    for name in ("a.safetensors", "b.safetensors"):  # an index whose shards are gone
        (folder / name).unlink()
    value, loaded = gain(folder)
    assert value == 3.0
    text = str(loaded.report)
    assert f"read     weights: {folder / 'model.safetensors'}" in text
    assert "left     model.safetensors.index.json, pytorch_model.bin: other weights" in text


def test_weights_in_a_sub_folder(folder, tmp_path):
    """With their settings, or below a folder that has them; one place only, and never outside."""
    save(tmp_path / "repo" / "towers" / "image" / "weights.safetensors", tensors(4.0))
    shutil.copy(folder / "config.json", tmp_path / "repo" / "towers" / "image")
    (tmp_path / "repo" / "README.md").write_text("no weights here")
    value, loaded = gain(tmp_path / "repo")
    assert value == 4.0
    assert loaded.report.read["weights"].endswith("towers/image/weights.safetensors")

    save(folder / "weights" / "model.safetensors", tensors(5.0))
    assert gain(folder)[0] == 5.0
    save(folder / "old" / "model.safetensors", tensors(6.0))
    with pytest.raises(CheckpointError, match=r"found several: 'old', 'weights'\. Give one"):
        gain(folder)
    assert gain(folder / "old", config=folder)[0] == 6.0
    save(folder / "model.safetensors", tensors(7.0))
    assert gain(folder)[0] == 7.0

    shards(tmp_path / "split", 8.0, names=("parts/a.safetensors", "parts/b.safetensors"))
    found = open_checkpoint(tmp_path / "split")
    np.testing.assert_array_equal(found["toy.gain"], tensors(8.0)["toy.gain"])
    assert find_weights(tmp_path / "split").left == ()
    for name in ("../a.safetensors", "parts/../../a.safetensors", "/etc/passwd", "parts//a"):
        index = {"weight_map": {"toy.gain": name}}
        (tmp_path / "split" / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="plain file names"):
            open_checkpoint(tmp_path / "split")


NESTED = {
    "image_processor": ImageProcessor(size=4, resize=5, mean=(0.1, 0.2, 0.3)).to_hf(),
    "processor_class": "ToyProcessor",
}


def test_settings_of_the_image_processor(folder, caplog):
    """transformers 5 writes them into `processor_config.json`, which it also reads first."""
    save(folder / "model.safetensors", tensors(1.0))
    _, loaded = gain(folder)
    assert loaded.processor.image == ImageProcessor(size=4, mode="squash")
    assert loaded.report.read["image processor"] == "no file: the default of toy"
    plain = ImageProcessor(size=4, mode="squash", std=(0.2, 0.2, 0.2))
    (folder / "preprocessor_config.json").write_text(json.dumps(plain.to_hf()))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Older"}))
    _, loaded = gain(folder)
    assert loaded.processor.image == plain
    assert loaded.report.read["image processor"].endswith("/preprocessor_config.json")
    assert not caplog.text
    (folder / "processor_config.json").write_text(json.dumps(NESTED))
    _, loaded = gain(folder)
    assert "preprocessor_config.json differ in image_mean, image_std" in caplog.text
    assert loaded.processor.image == ImageProcessor.from_hf(NESTED)
    assert loaded.report.read["image processor"].endswith("/processor_config.json")


def test_an_image_size_that_is_not_the_models_is_said(folder, caplog):
    save(folder / "model.safetensors", tensors(1.0))
    other = ImageProcessor(size=6, mode="squash")
    (folder / "preprocessor_config.json").write_text(json.dumps(other.to_hf()))
    _, loaded = gain(folder)
    assert loaded.processor.image.size == 6
    assert "makes images of 6 pixels, usual for this model are 4" in caplog.text


def test_adapters_of_peft_are_not_left_out_in_silence(folder, caplog):
    save(folder / "model.safetensors", tensors(1.0))
    gain(folder)
    assert not caplog.text
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    gain(folder)
    assert "adapter_config.json: adapters of PEFT are next to the weights" in caplog.text


def test_siglip_is_squashed_where_no_file_says(folder):
    from perception_jax.models.siglip.architecture import ARCHITECTURES
    from perception_jax.models.siglip.config import SiglipConfig

    for layout in ("hf", "reference"):
        image = ImageProcessor(**ARCHITECTURES[0].image_settings(SiglipConfig.base_224(), layout))
        assert (image.mode, image.size, image.mean) == ("squash", 224, (0.5, 0.5, 0.5))
