"""What `load` takes: folders of every layout, single files, settings given apart, parts of a larger
checkpoint, tensors that tell their model themselves, and the hub."""

from __future__ import annotations

import fnmatch
import json
import pathlib
import shutil
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import perception_jax
from perception_jax.api import Loaded, Processor, describe
from perception_jax.data.processors import ImageProcessor
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.interop.checkpoint_dir import open_checkpoint
from perception_jax.interop.checkpoint_source import open_source
from perception_jax.interop.verify import compare_params
from perception_jax.models.clip.config import ClipConfig, VisionConfig
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.eva.config import EvaConfig, EvaVisionConfig
from perception_jax.models.params import flatten, unflatten
from perception_jax.models.registry import architecture_of
from perception_jax.models.towers import TowerConfig
from perception_jax.nn.text_tower import TextConfig
from tests import torch_files

SIZES = {"width": 64, "depth": 2, "heads": 1, "mlp_dim": 72}
TEXT = {"vocab_size": 20, "context": 5, **SIZES}
PATCHES = {"image_size": 8, "patch_size": 4}
CLIP = ClipConfig(vision=VisionConfig(**PATCHES, **SIZES), text=TextConfig(**TEXT), embed_dim=4)
EVA = EvaConfig(
    vision=EvaVisionConfig(kind="eva02_rope", **PATCHES, **SIZES),
    text=TextConfig(**TEXT, act="gelu"),
    embed_dim=4,
    trunk="eva02_base_patch16_clip_224",
)


def made(config) -> Loaded:
    """A model with random numbers in every leaf."""
    arch = architecture_of(config)
    model = nnx.eval_shape(lambda: arch.build(config, rngs=nnx.Rngs(params=0)))
    rng = np.random.default_rng(0)
    params = {
        path: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        for path, leaf in flatten(model).items()
    }
    processor = Processor(
        image=ImageProcessor(size=8, mode="squash", mean=(0.1, 0.2, 0.3)), tokenizer=None
    )
    return Loaded(model=unflatten(model, params), config=config, processor=processor)


def same(before: Loaded, after: Loaded) -> None:
    assert after.config == before.config
    assert compare_params(flatten(before.model), flatten(after.model))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("clip") / "hf"
    perception_jax.export(made(CLIP), folder)
    return folder


@pytest.mark.parametrize(
    ("layout", "name"),
    [("hf", "config.json"), ("reference", "open_clip_config.json"), ("jax", "config.json")],
)
def test_a_file_with_its_settings_beside_it_or_given(tmp_path, layout, name):
    loaded, folder = made(CLIP), tmp_path / "folder"
    perception_jax.export(loaded, folder, layout=layout)
    (weights,) = folder.glob("*.safetensors")
    again = perception_jax.load(weights)
    same(loaded, again)
    assert again.processor.image == loaded.processor.image
    alone = shutil.copy(weights, tmp_path / "alone.safetensors")
    for config in (json.loads((folder / name).read_text()), folder / name, str(folder)):
        same(loaded, perception_jax.load(alone, config=config))
    with pytest.raises(CheckpointError, match=r"config\.json .*not identify the model.*`config`"):
        perception_jax.load(alone)


def test_eva_in_our_own_layout(tmp_path):
    """Sizes that open_clip's settings cannot express are said in ours."""
    loaded = made(EVA)
    with pytest.raises(ConfigError, match="'jax' layout"):
        perception_jax.export(loaded, tmp_path / "reference", layout="reference")
    perception_jax.export(loaded, tmp_path / "jax", layout="jax")
    again = perception_jax.load(tmp_path / "jax")
    same(loaded, again)
    assert again.processor.image == loaded.processor.image
    tower = perception_jax.load(tmp_path / "jax", prefix="vision/")
    assert tower.config == TowerConfig(vision=EVA.vision, embed_dim=4)
    assert {name.split("/")[0] for name in tower.report.aside} == {"text", "logit_scale"}


def test_the_image_tower_of_a_whole_model(clip, tmp_path):
    whole = perception_jax.load(clip)
    pixels = jnp.asarray(np.random.default_rng(1).normal(size=(1, 8, 8, 3)), jnp.float32)
    expected = whole.model.vision(pixels)

    tower = perception_jax.load(clip, prefix="vision_model.")
    assert tower.config == TowerConfig(vision=CLIP.vision, embed_dim=None)
    assert tower.processor.image == whole.processor.image
    out = tower.model(pixels)
    np.testing.assert_array_equal(out.pooled, expected.pooled)
    np.testing.assert_array_equal(out.embedding, expected.pooled)  # without the projection

    perception_jax.export(whole, tmp_path / "reference", layout="reference")
    tower = perception_jax.load(tmp_path / "reference", prefix="visual.")
    assert tower.config.embed_dim == 4
    np.testing.assert_array_equal(tower.model(pixels).embedding, expected.embedding)
    with pytest.raises(
        ConfigError, match=r"clip_vision_model .*'reference'; it has: hf, timm, jax"
    ):
        perception_jax.export(tower, tmp_path / "no", layout="reference")
    for layout in ("timm", "jax", "hf"):
        perception_jax.export(tower, tmp_path / layout, layout=layout)
        same(tower, perception_jax.load(tmp_path / layout))


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_without_settings(tmp_path, registers):
    """The authors' file alone tells all of it; a jax folder remembers how positions are resized."""
    config = Dinov2Config(
        image_size=28,
        patch_size=7,
        **(SIZES | {"mlp_dim": 256}),
        registers=registers,
        position_offset=0.0 if registers else 0.1,
        position_antialias=registers > 0,
    )
    loaded = made(config)
    perception_jax.export(loaded, tmp_path / "reference", layout="reference")
    assert [item.name for item in (tmp_path / "reference").iterdir()] == ["model.safetensors"]
    arrays = open_checkpoint(tmp_path / "reference")
    file = torch_files.save(tmp_path / "dinov2_vits14_pretrain.pth", arrays)
    chunked = {name.replace("blocks.", "backbone.blocks.0."): a for name, a in arrays.items()}
    other = torch_files.save(tmp_path / "chunked.pth", chunked)
    for source in (tmp_path / "reference", file, other):
        again = perception_jax.load(source)
        same(loaded, again)
        image = again.processor.image
        assert (image.size, image.resize, image.mode) == (224, 256, "tv_crop")
    perception_jax.export(again, tmp_path / "jax", layout="jax")
    same(loaded, perception_jax.load(tmp_path / "jax"))

    perception_jax.export(again, tmp_path / "timm", layout="timm")
    with_settings = perception_jax.load(tmp_path / "timm")
    without = perception_jax.load(tmp_path / "timm" / "model.safetensors", config=None)
    assert with_settings.config == without.config
    pixels = jnp.asarray(np.random.default_rng(1).normal(size=(1, 28, 28, 3)), jnp.float32)
    np.testing.assert_allclose(
        with_settings.model(pixels).tokens, loaded.model(pixels).tokens, atol=1e-5
    )


def test_openai_archives_need_no_settings(tmp_path):
    loaded = made(CLIP)
    perception_jax.export(loaded, tmp_path / "reference", layout="reference")
    arrays = dict(open_checkpoint(tmp_path / "reference"))
    file = torch_files.save(tmp_path / "state.pt", arrays)
    with pytest.raises(CheckpointError, match="do not identify the model"):
        perception_jax.load(file)  # the activation is unknown
    arrays |= dict.fromkeys(("input_resolution", "context_length", "vocab_size"), np.array(1.0))
    again = perception_jax.load(torch_files.save(tmp_path / "ViT-B-32.pt", arrays))
    same(loaded, again)
    assert again.processor.image.mode == "tv_crop"
    assert len(again.report.ignored) == 3


def test_a_folder_with_several_models(clip, tmp_path):
    """timm's tower beside the whole model of open_clip: the larger one is meant."""
    whole = made(CLIP)
    perception_jax.export(whole, tmp_path / "both", layout="reference")
    tower = perception_jax.load(clip, prefix="vision_model.")
    perception_jax.export(tower, tmp_path / "tower", layout="timm")
    for item in (tmp_path / "tower").iterdir():
        shutil.copy(item, tmp_path / "both")
    assert open_source(tmp_path / "both").layout == "reference"
    same(whole, perception_jax.load(tmp_path / "both"))
    # Hugging Face's settings describe as much as open_clip's, and their weights come first.
    for item in clip.iterdir():
        shutil.copy(item, tmp_path / "both")
    assert open_source(tmp_path / "both").layout == "hf"
    (tmp_path / "both" / "model.safetensors").unlink()
    assert open_source(tmp_path / "both").layout == "reference"


class Hub:
    """Stands in for `huggingface_hub`: a repository's files, fetched by pattern."""

    def __init__(self, remote: pathlib.Path, local: pathlib.Path):
        self.remote, self.local, self.asked = remote, local, []

    def snapshot_download(self, name, revision, allow_patterns):
        assert revision is None  # one process takes the newest
        self.asked.append(allow_patterns)
        if name != "owner/name":
            raise OSError(f"404 for {name}")
        self.local.mkdir(exist_ok=True)
        names = [str(f.relative_to(self.remote)) for f in self.remote.rglob("*") if f.is_file()]
        for name in names:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (self.local / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.remote / name, self.local / name)
        return str(self.local)

    def files(self) -> list[str]:
        return sorted(str(f.relative_to(self.local)) for f in self.local.rglob("*") if f.is_file())


@pytest.fixture
def connect(tmp_path, monkeypatch):
    def connect(remote: pathlib.Path, local: str) -> Hub:
        hub = Hub(remote, tmp_path / local)
        module = types.SimpleNamespace(snapshot_download=hub.snapshot_download)
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        return hub

    return connect


def test_the_hub_gives_bin_files_only_where_there_are_no_safetensors(clip, tmp_path, connect):
    remote = tmp_path / "remote"
    shutil.copytree(clip, remote)
    torch_files.save(remote / "pytorch_model.bin", open_checkpoint(clip))
    hub = connect(remote, "first")
    expected = perception_jax.load("owner/name")
    assert not list(hub.local.glob("*.bin"))
    (remote / "model.safetensors").unlink()
    hub = connect(remote, "second")
    same(expected, perception_jax.load("owner/name"))
    assert [patterns[-1] for patterns in hub.asked] == ["*.safetensors", "*.bin"]
    with pytest.raises(CheckpointError, match="404 for owner/other"):
        perception_jax.load("owner/other")
    with pytest.raises(CheckpointError, match="neither a folder or file"):
        perception_jax.load("runs/missing.safetensors")


def test_the_processor_of_a_hub_id_is_read_without_its_weights(clip, tmp_path, connect):
    remote = tmp_path / "remote"
    shutil.copytree(clip, remote)
    expected = perception_jax.load(clip)
    hub = connect(remote, "settings")
    config, processor = describe("owner/name")
    assert (config, processor.image) == (expected.config, expected.processor.image)
    assert not [name for name in hub.files() if "safetensors" in name]
    # Only the weights tell which of two files of settings is theirs.
    (remote / "open_clip_config.json").write_text("{}")
    hub = connect(remote, "both")
    assert describe("owner/name")[0] == expected.config
    assert "model.safetensors" in hub.files()


def test_one_file_or_folder_of_a_hub_repository(clip, tmp_path, connect):
    remote = tmp_path / "remote"
    shutil.copytree(clip, remote / "towers" / "clip")
    torch_files.save(remote / "towers" / "clip" / "ema[1].pth", open_checkpoint(clip))
    torch_files.save(remote / "other.bin", open_checkpoint(clip))
    hub = connect(remote, "file")
    loaded = perception_jax.load("owner/name:towers/clip/ema[1].pth")
    same(perception_jax.load(clip), loaded)
    assert loaded.report.read["weights"].endswith("file/towers/clip/ema[1].pth")
    assert [name for name in hub.files() if not name.endswith(".json")] == [
        "towers/clip/ema[1].pth"
    ]
    hub = connect(remote, "folder")
    same(loaded, perception_jax.load("owner/name:towers/clip"))
    assert "other.bin" not in hub.files()
    assert "towers/clip/model.safetensors" in hub.files()
    for name, message in (
        ("owner/name:towers/clip/none.pth", "expected towers/clip/none.pth in the repository"),
        ("owner/name:none", "expected none in the repository"),
        ("owner/name:../x.pth", "expected the path of a file or folder"),
        ("owner/name:/etc/passwd", "expected the path of a file or folder"),
        ("owner/name:", "neither a folder or file"),
        ("owner:x.pth", "neither a folder or file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            perception_jax.load(name)
