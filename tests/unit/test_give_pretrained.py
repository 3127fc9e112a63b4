"""GiVE loaded and used: without steering it is the backbone bit for bit, it stands where an image
tower stands, and files that do not fit are named."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perception_jax
from perception_jax.api import load_backbone
from perception_jax.data.scenes.objects import names as scene_names
from perception_jax.data.scenes.source import portrait
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.interop import hub
from perception_jax.interop.adapters import FINGERPRINT
from perception_jax.interop.fingerprint import fingerprint
from perception_jax.interop.safetensors_io import SafetensorsFile
from perception_jax.interop.tensors import LazyTensor, TensorSpec
from perception_jax.interop.writer import write_file
from perception_jax.models.params import flatten, unflatten
from perception_jax.nn import maps
from perception_jax.nn.adapters import AdapterParam
from perception_jax.nn.taps import Taps
from perception_jax.systems.give.adapter import AdapterConfig
from perception_jax.systems.give.checkpoint import load_give, save_give
from perception_jax.systems.give.model import GiveConfig
from perception_jax.systems.give.pretrained import (
    ADAPTERS_FILE,
    GiveEncoder,
    export_merged,
    find_adapters,
)
from tests import tiny_give
from tests.tiny_give import DEPTH, WIDTH

IMAGES = list(np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), np.uint8))
TOLD = ["the kite", "a small dog"]
NAMES = scene_names(16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone's folder, and adapters for it whose file names it."""
    return tiny_give.write(tmp_path_factory.mktemp("give")).parent


@pytest.fixture(scope="module")
def encoder(folder) -> GiveEncoder:
    return GiveEncoder.from_pretrained(folder / ADAPTERS_FILE)


@pytest.fixture(scope="module")
def plain(folder):
    """The backbone's own output for `IMAGES`, with all hidden states."""
    loaded = perception_jax.load(folder / "backbone")
    taps = Taps(hidden=tuple(range(DEPTH + 1)))
    run = jax.jit(lambda model, pixels: model.vision(pixels, taps=taps))
    return run(loaded.model, loaded.processor.images(IMAGES))


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_without_steering_it_is_the_backbone_bit_for_bit(encoder, plain, alpha):
    options = {} if alpha is None else {"alpha": alpha}
    told = None if alpha is None else TOLD
    out = encoder.encode(IMAGES, told, hidden_states=True, **options)
    np.testing.assert_array_equal(out.hidden_states, plain.hidden)
    np.testing.assert_array_equal(out.tokens, plain.hidden[-1])
    unit = plain.embedding / np.linalg.norm(plain.embedding, axis=1, keepdims=True)
    np.testing.assert_allclose(out.embedding, unit, atol=1e-6)
    assert (out.presence_logit is None) == (alpha is None)


def test_steering_changes_every_image_and_grows_with_its_strength(encoder):
    static = encoder.encode(IMAGES).embedding
    moved = [
        np.linalg.norm(encoder.encode(IMAGES, TOLD, alpha=alpha).embedding - static, axis=1)
        for alpha in (0.0, 0.5, 1.0)
    ]
    assert (moved[0] == 0).all()
    assert (moved[1] > 1e-3).all()
    assert (moved[2] > moved[1]).all()


def test_an_instruction_is_of_its_image_alone(encoder):
    """Batch mates and longer instructions next to it, which pad it, change nothing."""
    alone = encoder.encode(IMAGES[:1], TOLD[:1])
    beside = encoder.encode(IMAGES, TOLD)
    np.testing.assert_allclose(beside.embedding[0], alone.embedding[0], atol=1e-6)
    np.testing.assert_allclose(beside.presence_logit[0], alone.presence_logit[0], atol=1e-6)


def test_instructions_are_counted(encoder, unchecked):
    with pytest.raises(ConfigError, match="one instruction for each of 2 images, found 1"):
        encoder.encode(IMAGES, TOLD[:1])
    with pytest.raises(ConfigError, match="one instruction for each of 2 images, found 1"):
        encoder.encode(IMAGES, "ab")  # one instruction, not one of each letter
    one = encoder.encode(IMAGES[0], TOLD[0]).embedding
    np.testing.assert_array_equal(one, encoder.encode(IMAGES[:1], TOLD[:1]).embedding)


def test_fresh_adapters_change_nothing(folder, plain):
    config = GiveConfig(layers=(1,), adapter=AdapterConfig(heads=2))
    fresh = GiveEncoder.from_pretrained(backbone=folder / "backbone", config=config)
    out = fresh.encode(IMAGES, TOLD)
    np.testing.assert_allclose(out.tokens, plain.hidden[-1], atol=1e-6)


# --- Where an image tower stands ----------------------------------------------------------------


def test_a_steered_tower_is_an_image_tower(encoder, plain):
    def see(model, told, alpha, pixels):
        tower = GiveEncoder(model, encoder.backbone).tower(told, alpha=alpha)
        assert isinstance(tower, maps.Tower)
        assert tower.prefix == 1
        return tower(pixels), maps.class_attention(tower, pixels)

    pixels, told = encoder.processor.images(IMAGES), encoder.instructions(TOLD)
    see = jax.jit(see, static_argnums=2)
    out, attention = see(encoder.model, told, 1.0, pixels)
    assert (out.grid, out.prefix) == (plain.grid, plain.prefix) == ((2, 2), 1)
    np.testing.assert_allclose(out.embedding, encoder.encode(IMAGES, told).embedding, atol=1e-6)
    static = jax.jit(maps.class_attention)(encoder.model.backbone.vision, pixels)
    assert attention.shape == static.shape == (2, 2, 2)
    assert float(jnp.abs(attention - static).max()) > 1e-3
    np.testing.assert_allclose(see(encoder.model, told, 0.0, pixels)[1], static, atol=1e-6)


@dataclasses.dataclass
class Projector:
    """What stands between an image tower and a language model in LLaVA. It takes any tower that
    has a `prefix` and can be called, and reads a hidden state from its first patch on."""

    kernel: np.ndarray
    layer: int = -2

    def __call__(self, tower: maps.Tower, pixels: jax.Array) -> jax.Array:
        out = tower(pixels, taps=Taps(hidden=(self.layer,)))
        return out.hidden[0][:, tower.prefix :] @ self.kernel


@pytest.mark.parametrize("layer", [-2, 1])
def test_a_consumer_of_image_towers_reads_the_features_of_llava(encoder, layer):
    project = Projector(np.eye(WIDTH, dtype=np.float32), layer)
    pixels, told = encoder.processor.images(IMAGES), encoder.instructions(TOLD)

    @jax.jit
    def consume(model, told, pixels):
        tower = GiveEncoder(model, encoder.backbone).tower(told, alpha=0.5)
        return project(tower, pixels), project(model.backbone.vision, pixels)

    read, static = consume(encoder.model, told, pixels)
    features = encoder.llava_features(IMAGES, TOLD, layer=layer)
    assert features.shape == (2, 4, WIDTH)
    np.testing.assert_allclose(read, features, atol=1e-6)
    unsteered = encoder.llava_features(IMAGES, None, layer=layer)
    np.testing.assert_allclose(static, unsteered, atol=1e-6)
    assert float(jnp.abs(features - unsteered).max()) > 1e-3


# --- Files --------------------------------------------------------------------------------------


def test_the_shipped_adapters_tell_what_is_there_in_drawings_that_never_trained():
    """Each name is asked of every drawing; chance puts a drawing's own first in one of sixteen."""
    encoder = GiveEncoder.from_pretrained("scenes-give")
    assert encoder.backbone.name == "scenes-clip"
    own = fingerprint(flatten(perception_jax.load("scenes-clip").model))
    assert SafetensorsFile(find_adapters("scenes-give")).metadata[FINGERPRINT] == own
    size = encoder.processor.image.size
    images = [portrait(name, "twemoji", canvas=size, seed=0) for name in NAMES for _ in NAMES]
    asked = [f"the {name}" for _ in NAMES for name in NAMES]
    logits = encoder.encode(images, asked).presence_logit.reshape(len(NAMES), len(NAMES))
    assert (logits.argmax(axis=1) == np.arange(len(NAMES))).mean() >= 0.3
    own = np.diagonal(logits)
    others = logits[~np.eye(len(NAMES), dtype=bool)]
    assert own.mean() > others.mean() + 2


def test_what_lies_in_a_folder_of_a_shipped_name_comes_first(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("scenes-give").mkdir()
    with pytest.raises(CheckpointError, match=r"scenes-give/give\.safetensors: no adapters there"):
        GiveEncoder.from_pretrained("scenes-give")


def test_adapters_in_half_the_bytes_say_nearly_the_same(encoder, tmp_path):
    path = tmp_path / "half.safetensors"
    save_give(path, encoder.model, encoder.backbone, dtype="bfloat16")
    whole = tmp_path / "whole.safetensors"
    save_give(whole, encoder.model, encoder.backbone)
    assert path.stat().st_size < 0.7 * whole.stat().st_size
    half = GiveEncoder.from_pretrained(path, backbone=encoder.backbone.name)
    found, expected = (one.encode(IMAGES, TOLD) for one in (half, encoder))
    np.testing.assert_allclose(found.embedding, expected.embedding, atol=0.01)


def test_a_folder_with_adapters_is_as_good_as_their_file(folder):
    assert find_adapters(folder) == folder / ADAPTERS_FILE
    other = folder / "other.safetensors"
    assert find_adapters(other, missing_ok=True) == other
    with pytest.raises(CheckpointError, match=r"holds give\.safetensors, or shipped ones"):
        find_adapters(other)


def test_a_merged_folder_comes_back_bit_for_bit(encoder, tmp_path):
    export_merged(tmp_path / "merged", encoder)
    again = GiveEncoder.from_pretrained(tmp_path / "merged")
    assert again.backbone.name == str(tmp_path / "merged")
    before, after = flatten(encoder.model), flatten(again.model)
    assert before.keys() == after.keys()
    for path in before:
        np.testing.assert_array_equal(before[path], after[path], err_msg=path)
    np.testing.assert_array_equal(
        again.encode(IMAGES, TOLD).embedding, encoder.encode(IMAGES, TOLD).embedding
    )
    plain = flatten(perception_jax.load(tmp_path / "merged").model)  # without knowing of GiVE
    assert plain.keys() == flatten(tiny_give.tiny_clip().model).keys()
    with pytest.raises(CheckpointError, match="an empty or new folder"):
        export_merged(tmp_path / "merged", encoder)
    assert [item.name for item in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_merged_folder_is_made_for_the_size_that_was_trained_on(folder, tmp_path, dtype):
    encoder = GiveEncoder.from_pretrained(folder / ADAPTERS_FILE, dtype=dtype)
    own = encoder.processor.image.size
    larger = GiveEncoder(encoder.model, encoder.backbone.at_size(2 * own))
    export_merged(tmp_path / "merged", larger)
    # Resized positions are float32; transformers would round them to what the other leaves are.
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert settings.get("torch_dtype") == (dtype and "float32")
    plain = perception_jax.load(tmp_path / "merged")
    assert plain.config.vision.image_size == plain.processor.image.size == 2 * own
    again = GiveEncoder.from_pretrained(tmp_path / "merged")
    found, expected = (one.encode(IMAGES, TOLD) for one in (again, larger))
    np.testing.assert_allclose(found.embedding, expected.embedding, atol=1e-6)
    np.testing.assert_allclose(found.presence_logit, expected.presence_logit, atol=1e-6)
    assert abs(found.embedding - encoder.encode(IMAGES, TOLD).embedding).max() > 1e-3


def test_a_workdirs_settings_are_no_backbone(folder, tmp_path):
    """A training leaves `config.json`, its settings, beside the adapters."""
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{}")
    with_metadata(tmp_path / "run" / ADAPTERS_FILE, backbone="backbone")
    found = GiveEncoder.from_pretrained(tmp_path / "run")
    assert found.backbone.name == str(tmp_path / "run" / "backbone")


def with_metadata(path, **changes) -> None:
    """Writes other strings into the metadata of a file."""
    file = SafetensorsFile(path)
    arrays = {name: np.array(file[name]) for name in file}
    tensors = [LazyTensor(n, s, lambda n=n: arrays[n]) for n, s in file.specs.items()]
    write_file(path, tensors, file.metadata | changes)


def test_a_backbone_that_a_file_names_is_not_followed_anywhere(folder, tmp_path, monkeypatch):
    """Neither fetched nor read from elsewhere, unless the user says so."""
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda name: asked.append(name) or folder / "backbone")
    run = tmp_path / "run"
    run.mkdir()
    path = run / ADAPTERS_FILE
    path.write_bytes((folder / ADAPTERS_FILE).read_bytes())
    (run / "link").symlink_to(folder / "backbone")
    names = ["/etc", "../..", ".", "", "owner/name", "link", str(folder / "backbone"), "a\0b"]
    for name in (*names, "n" * 5000, f"../{folder.name}/backbone", "~", "file:///etc"):
        with_metadata(path, backbone=name)
        with pytest.raises(CheckpointError, match=r"give it as `backbone`") as error:
            GiveEncoder.from_pretrained(run)
        assert len(str(error.value)) < 600
    assert not asked
    with_metadata(path, backbone="owner/name")
    assert GiveEncoder.from_pretrained(run, trusted=("owner/name",)).backbone.name == "owner/name"
    assert GiveEncoder.from_pretrained(run, backbone="owner/name").backbone.name == "owner/name"
    assert asked == 2 * ["owner/name"]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("adapter_heads", ["0", "-1", "04x", "٤", "4.0", "true", "", "9" * 5000, "9" * 9]),
        ("image_size", ["0", "-48", "1e3", "９", "", "99999999", "9" * 5000]),
        ("image_mode", ["", "crop", "None"]),
        ("adapter_act", ["", "gelu_erf"]),
        ("adapter_eps", ["0", "-1e-5", "nan", "1e999", "1..5", "٤"]),
        ("head_act", ["softmax"]),
    ],
)
def test_metadata_that_makes_no_sense(folder, tmp_path, key, values):
    path = tmp_path / ADAPTERS_FILE
    path.write_bytes((folder / ADAPTERS_FILE).read_bytes())
    for value in values:
        with_metadata(path, **{key: value})
        with pytest.raises(CheckpointError, match=rf"{key}: expected .*, found ") as error:
            GiveEncoder.from_pretrained(path, backbone=folder / "backbone")
        assert len(str(error.value)) < 600


@pytest.mark.parametrize("block", ["99999999", "9" * 900])
def test_adapters_of_blocks_that_no_tower_has(folder, tmp_path, block):
    file = SafetensorsFile(folder / ADAPTERS_FILE)
    theirs = renamed(file, lambda name: name.replace("ag_adapters.2.", f"ag_adapters.{block}."))
    write_file(tmp_path / "far.safetensors", theirs, file.metadata)
    with pytest.raises(CheckpointError, match="block: expected an integer of 0 to 1023"):
        GiveEncoder.from_pretrained(tmp_path / "far.safetensors", backbone=folder / "backbone")


def renamed(file: SafetensorsFile, rename) -> list[LazyTensor]:
    return [
        LazyTensor(rename(name), spec, lambda name=name: np.asarray(file[name]))
        for name, spec in file.specs.items()
    ]


def test_foreign_names_are_mapped(folder, encoder, tmp_path):
    file = SafetensorsFile(folder / ADAPTERS_FILE)
    theirs = renamed(file, lambda name: "model." + name.replace("ag_adapters", "cross_attn"))
    write_file(tmp_path / "theirs.safetensors", theirs, file.metadata)
    renames = [(r"^model\.", ""), (r"^cross_attn\.", "ag_adapters.")]
    named = {"backbone": folder / "backbone"}
    mapped = GiveEncoder.from_pretrained(tmp_path / "theirs.safetensors", renames=renames, **named)
    for path, leaf in flatten(encoder.model, AdapterParam).items():
        np.testing.assert_array_equal(flatten(mapped.model, AdapterParam)[path], leaf)
    with pytest.raises(CheckpointError, match=r"ag_adapters\.1\.to_q.*renames"):
        GiveEncoder.from_pretrained(tmp_path / "theirs.safetensors", **named)


def test_another_backbone_is_refused_by_name(folder):
    perception_jax.export(tiny_give.tiny_clip(width=40), folder / "wider")
    with pytest.raises(CheckpointError) as error:
        GiveEncoder.from_pretrained(folder / ADAPTERS_FILE, backbone=folder / "wider")
    assert "ag_adapters.0.norm.weight has shape (32,), expected (40,)" in str(error.value)


def test_other_weights_under_the_same_name_are_refused(folder, encoder, tmp_path):
    """The file says which weights it was trained with: here some of the same shapes lie there."""
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    shutil.rmtree(run / "backbone")
    other = tiny_give.tiny_clip()
    leaves = flatten(other.model)
    leaves["text/projection/kernel"] = leaves["text/projection/kernel"] + 0.1
    other = dataclasses.replace(other, model=unflatten(other.model, leaves))
    perception_jax.export(other, run / "backbone")
    with pytest.raises(CheckpointError) as error:
        GiveEncoder.from_pretrained(run)
    own = fingerprint(flatten(perception_jax.load(folder / "backbone").model))
    found = fingerprint(leaves)
    assert f"'backbone' with fingerprint {own}" in str(error.value)
    assert f"backbone' with fingerprint {found}" in str(error.value)
    assert own != found
    # The right weights elsewhere, under any name.
    again = GiveEncoder.from_pretrained(run, backbone=folder / "backbone")
    np.testing.assert_array_equal(again.encode(IMAGES).tokens, encoder.encode(IMAGES).tokens)


def test_an_older_file_without_a_fingerprint_loads_with_a_warning(folder, tmp_path, caplog):
    path = tmp_path / ADAPTERS_FILE
    file = SafetensorsFile(folder / ADAPTERS_FILE)
    older = {k: v for k, v in file.metadata.items() if k != FINGERPRINT}
    write_file(path, renamed(file, str), older)
    with caplog.at_level(logging.WARNING):
        GiveEncoder.from_pretrained(path, backbone=folder / "backbone")
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{path} has no fingerprint of its backbone 'backbone': whether ")
    caplog.clear()
    GiveEncoder.from_pretrained(folder / ADAPTERS_FILE)
    assert not caplog.records


def test_names_in_files_start_from_the_files_folder(folder, tmp_path, monkeypatch):
    """Adapters and backbone may move together, and the working directory may be any."""
    assert SafetensorsFile(folder / ADAPTERS_FILE).metadata["backbone"] == "backbone"
    shutil.copytree(folder, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    found = GiveEncoder.from_pretrained("moved")
    assert found.backbone.name == str(pathlib.Path("moved") / "backbone")
    # A backbone beside the folder: named relative to it, and read only if the user names it too.
    (tmp_path / "run").mkdir()
    beside = GiveEncoder(found.model, dataclasses.replace(found.backbone, name="moved/backbone"))
    save_give("run/give.safetensors", beside.model, beside.backbone)
    metadata = SafetensorsFile("run/give.safetensors").metadata
    assert metadata["backbone"] == str(pathlib.Path("..") / "moved" / "backbone")
    with pytest.raises(CheckpointError, match="give it as `backbone`"):
        GiveEncoder.from_pretrained("run")
    for trusted in ("moved/backbone", str(tmp_path / "moved" / "backbone")):
        again = GiveEncoder.from_pretrained("run", trusted=("scenes-clip", trusted))
        assert fingerprint(flatten(again.model)) == fingerprint(flatten(found.model))


def test_a_backbone_is_opened_before_its_weights_are_read(folder, tmp_path):
    opened = perception_jax.api.open_backbone(folder / "backbone")
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in flatten(opened.model).values())
    with pytest.raises(ConfigError, match="weights have not been read"):
        perception_jax.export(opened, tmp_path / "out")
    read, loaded = opened.load_weights(), load_backbone(folder / "backbone")
    assert (read.name, read.config) == (loaded.name, loaded.config)
    assert fingerprint(flatten(read.model)) == fingerprint(flatten(loaded.model))
    with pytest.raises(CheckpointError, match="have been read already"):
        read.load_weights()


@pytest.mark.parametrize("shape", [(), (0,)])
def test_a_hidden_layer_that_makes_no_sense(folder, tmp_path, shape):
    """Shapes come from a file that may be anyone's."""
    file, name = SafetensorsFile(folder / ADAPTERS_FILE), "ag_adapters.0.mlp.fc1.bias"
    empty = LazyTensor(name, TensorSpec(shape, np.dtype(np.float32)), lambda: np.zeros(shape, "f4"))
    tensors = [empty if one.name == name else one for one in renamed(file, str)]
    write_file(tmp_path / "odd.safetensors", tensors, file.metadata)
    with pytest.raises(CheckpointError, match=r"hidden layer: expected|fc1\.bias has shape"):
        GiveEncoder.from_pretrained(tmp_path / "odd.safetensors", backbone=folder / "backbone")


def test_settings_that_no_shape_tells_come_back(folder, tmp_path):
    adapter = AdapterConfig(heads=2, mlp_hidden=20, act="relu", eps=1e-3, gate="tanh")
    config = GiveConfig(layers=(1,), adapter=adapter, head_act="quick_gelu")
    backbone = load_backbone(folder / "backbone")
    give = tiny_give.with_adapters(backbone, config)
    save_give(tmp_path / ADAPTERS_FILE, give, backbone)
    again = load_give(tmp_path / ADAPTERS_FILE, backbone)
    assert again.backbone.vision.blocks.inserts.config == adapter
    assert again.oid_head.act == "quick_gelu"
    linear = AdapterConfig(heads=2, connector="linear")
    give = tiny_give.with_adapters(backbone, GiveConfig(layers=(1,), adapter=linear))
    save_give(tmp_path / ADAPTERS_FILE, give, backbone)
    again = load_give(tmp_path / ADAPTERS_FILE, backbone)
    assert again.backbone.vision.blocks.inserts.config == linear
    with pytest.raises(ConfigError, match='mlp_hidden: expected None for the connector "linear"'):
        AdapterConfig(connector="linear", mlp_hidden=8)


def test_missing_and_unknown_names_are_all_listed(folder, tmp_path):
    file = SafetensorsFile(folder / ADAPTERS_FILE)
    swap = {"oid_head.fc1.bias": "oid_head.first.bias", "oid_head.fc2.bias": "oid_head.last.bias"}
    write_file(tmp_path / "odd.safetensors", renamed(file, lambda n: swap.get(n, n)), file.metadata)
    with pytest.raises(CheckpointError) as error:
        load_give(tmp_path / "odd.safetensors", load_backbone(folder / "backbone"))
    assert all(name in str(error.value) for name in (*swap, *swap.values()))


def test_nothing_to_stand_on_is_said(folder, tmp_path):
    with pytest.raises(ConfigError, match="the backbone, the adapters, or both"):
        GiveEncoder.from_pretrained()
    file = SafetensorsFile(folder / ADAPTERS_FILE)
    nameless = {k: v for k, v in file.metadata.items() if k == "adapter_heads"}
    write_file(tmp_path / "nameless.safetensors", renamed(file, str), nameless)
    with pytest.raises(CheckpointError, match="does not name its backbone"):
        GiveEncoder.from_pretrained(tmp_path / "nameless.safetensors")
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        GiveEncoder.from_pretrained(tmp_path / "none.safetensors")
