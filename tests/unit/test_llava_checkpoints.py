"""Checkpoints of LLaVA in the authors' layouts: whole, in parts, projectors alone, LoRA."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import perception_jax
from perception_jax import api
from perception_jax.api import Loaded, Processor
from perception_jax.data.processors import ImageProcessor
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.generate import IMAGE
from perception_jax.models.dinov2.modeling import Dinov2
from perception_jax.models.llama.modeling import Llama
from perception_jax.models.llava import Llava
from perception_jax.models.params import flatten, unflatten
from perception_jax.models.registry import architecture
from perception_jax.nn.lora import LoraConfig, add_lora, merge_lora
from perception_jax.testing import tiny_clip, tiny_llama, tiny_llava
from tests import torch_files
from tests.arrays import drawn

CONFIGS = {"clip": tiny_llava.CONFIG, "imof": tiny_llava.IMOF, "amof": tiny_llava.AMOF}
COPY = "model.dino_tower.clip_vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"


def loaded_of(config, seed=0):
    model = drawn(lambda: Llava(config, rngs=nnx.Rngs(params=0)), seed)
    processor = Processor(image=tiny_llava.processor(config), tokenizer=tiny_llama.tokenizer())
    return Loaded(model=model, config=config, processor=processor, name="tiny LLaVA")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of the authors' layout for each kind of mixing."""
    root = tmp_path_factory.mktemp("llava")
    for name, config in CONFIGS.items():
        api.export(loaded_of(config), root / name, layout="reference")
    return root


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def rewritten(folder, tmp_path, keep, more=None, **settings):
    """A copy of a folder with some of its tensors and other settings; None removes one."""
    found = {name: x for name, x in tensors_of(folder).items() if keep(name)} | (more or {})
    config = json.loads((folder / "config.json").read_text()) | settings
    path = tmp_path / "changed"
    path.mkdir()
    safetensors.numpy.save_file(found, path / "model.safetensors")
    given = {name: value for name, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(given))
    return path


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.mark.parametrize("layout", ["reference", "jax"])
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(name, layout, tmp_path):
    given = loaded_of(CONFIGS[name])
    api.export(given, tmp_path / "out", layout=layout)
    found = perception_jax.load(tmp_path / "out")
    assert found.config == given.config
    assert found.processor.image == given.processor.image
    texts = [one.processor.tokenizer("the cat").tolist() for one in (found, given)]
    assert texts[0] == texts[1]
    assert_equal(flatten(found.model), flatten(given.model))


def test_names_of_the_authors(folders):
    names = tensors_of(folders / "imof").keys()
    assert {
        "model.embed_tokens.weight",
        "model.layers.2.self_attn.o_proj.weight",
        "lm_head.weight",
        "model.mm_projector.0.weight",
        "model.dino_mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight",
        "model.dino_tower.vision_tower.blocks.1.ls2.gamma",
    } <= names
    settings = json.loads((folders / "imof" / "config.json").read_text())
    assert settings["model_type"] == "llava"
    assert settings["mm_projector_type"] == "mlp2x_gelu"
    assert settings["mm_vision_select_layer"] == -2
    assert settings["image_aspect_ratio"] == "pad"


def test_mof_is_recognised_by_names_and_its_second_clip_dropped(folders, tmp_path):
    """As `MMVP/MoF_Models`: settings of one tower, sizes of DINOv2 from its tensors."""
    path = rewritten(
        *(folders / "imof", tmp_path, lambda name: True, {COPY: np.zeros((40, 24), np.float32)}),
        dino_config=None,
        perception_jax_mixing=None,
    )
    found = perception_jax.load(path)
    assert found.config == CONFIGS["imof"]
    assert list(found.report.ignored) == [COPY]
    assert "second CLIP" in str(found.report)
    # Without a file of its own the processor is that of the authors' code.
    image = found.processor.image
    assert (image.mode, image.exif, image.alpha, image.size) == ("llava_pad", False, "drop", 24)


def test_additive_mixing_needs_its_ratio(folders, tmp_path):
    path = rewritten(
        *(folders / "amof", tmp_path, lambda name: True),
        dino_config=None,
        perception_jax_mixing=None,
    )
    with pytest.raises(ConfigError, match=r"add {'mixing': 'additive', 'ratio'"):
        perception_jax.load(path)


def export_tower(folder, *, whole):
    """The tiny LLaVA's CLIP in a folder of Hugging Face: alone, or in a whole CLIP."""
    leaves = flatten(loaded_of(CONFIGS["clip"]).model)
    own = {p.removeprefix("vision/"): x for p, x in leaves.items() if p.startswith("vision/")}
    config = tiny_llava.CLIP
    if whole:
        config = dataclasses.replace(tiny_clip.CONFIG, vision=config.vision)
        own = {f"vision/{path}": leaf for path, leaf in own.items()}
    build = architecture("clip" if whole else "clip_vision_model").build
    model = drawn(lambda: build(config, rngs=nnx.Rngs(params=0)))
    model = unflatten(model, flatten(model) | own)
    processor = Processor(image=ImageProcessor(size=24), tokenizer=None)
    api.export(Loaded(model=model, config=config, processor=processor), folder)
    return folder


@pytest.mark.parametrize("whole", [False, True])
def test_a_tower_that_is_only_named_is_read_from_its_own_checkpoint(whole, folders, tmp_path):
    """As `liuhaotian/llava-v1.5-7b`."""
    tower = export_tower(tmp_path / "openai", whole=whole)
    path = rewritten(
        *(folders / "clip", tmp_path, lambda name: "vision_tower" not in name),
        vision_config=None,
        mm_vision_tower=str(tower),
    )
    opened = api.prepare(path)
    assert opened.config == CONFIGS["clip"]
    mesh = jax.make_mesh((1, 2, 1), ("replica", "fsdp", "tensor"))
    for found in (opened.load_weights(), perception_jax.load(path, mesh=mesh)):
        assert_equal(flatten(found.model), flatten(loaded_of(CONFIGS["clip"]).model))
    assert str(tower) in found.report.read["vision/ weights"]
    some = {
        p: jax.ShapeDtypeStruct(x.shape, np.float16, sharding=None)
        for p, x in flatten(opened.model).items()
        if p in ("vision/norm_pre/scale", "language/norm_final/scale")
    }
    assert {p: x.dtype for p, x in opened.read(some).items()} == dict.fromkeys(some, np.float16)


def test_an_unknown_tower_is_named(folders, tmp_path):
    path = rewritten(
        folders / "clip",
        tmp_path,
        lambda name: True,
        vision_config=None,
        mm_vision_tower="own/clip",
    )
    with pytest.raises(ConfigError, match=r"'own/clip'.*Put its settings under 'vision_config'"):
        perception_jax.load(path)


def test_images_of_llava_next_are_refused(folders, tmp_path):
    path = rewritten(folders / "clip", tmp_path, lambda name: True, image_aspect_ratio="anyres")
    with pytest.raises(ConfigError, match=r"image_aspect_ratio.*anyres"):
        perception_jax.load(path)


def test_llava_hf_holds_one_tower_and_an_id_for_images(tmp_path):
    with pytest.raises(ConfigError, match="one image tower"):
        api.export(loaded_of(CONFIGS["imof"]), tmp_path / "a")
    with pytest.raises(ConfigError, match="needs an id for images"):
        api.export(loaded_of(CONFIGS["clip"]), tmp_path / "b")


# --- Projectors -----------------------------------------------------------------------------------


def stage_one(folder, given):
    """The files that the authors' first stage writes: the first holds both projectors."""
    leaves = flatten(given.model)
    named = {}
    for path, name in (("projector", "mm_projector"), ("second_projector", "dino_mm_projector")):
        for k, place in ((1, 0), (2, 2)):
            if f"{path}/fc{k}/kernel" in leaves:
                kernel, bias = (np.asarray(leaves[f"{path}/fc{k}/{n}"]) for n in ("kernel", "bias"))
                named[f"model.{name}.{place}.weight"] = kernel.T
                named[f"model.{name}.{place}.bias"] = bias
    folder.mkdir()
    torch_files.save(folder / "mm_projector.bin", named)
    second = {name: x for name, x in named.items() if "dino_mm_projector" in name}
    if second:
        torch_files.save(folder / "dino_mm_projector.bin", second)
    return folder


def projectors(model):
    names = ("projector/", "second_projector/")
    return {path: np.asarray(x) for path, x in flatten(model).items() if path.startswith(names)}


def test_projectors_are_handed_over_and_the_collision_is_a_flag(tmp_path):
    small = dataclasses.replace(tiny_llava.IMOF, towers=(tiny_llava.CLIP, equal_width()))
    trained, base = loaded_of(small, seed=1), loaded_of(small)
    files = stage_one(tmp_path / "stage1", trained)
    right = api.load_projectors(base, files)
    assert_equal(projectors(right.model), projectors(trained.model))
    others = {p: x for p, x in flatten(base.model).items() if "projector" not in p}
    assert all(flatten(right.model)[path] is leaf for path, leaf in others.items())
    # In the released code both slots start as the second projector.
    wrong = projectors(api.load_projectors(base, files, reference_adapter_collision=True).model)
    wanted = projectors(trained.model)
    for path in wanted:
        np.testing.assert_array_equal(wrong[path], wanted[f"second_{path.removeprefix('second_')}"])
    # One file with both, and one in our own format.
    one = api.load_projectors(base, files / "mm_projector.bin")
    assert_equal(projectors(one.model), wanted)
    api.save_projectors(trained, tmp_path / "ours")
    assert_equal(projectors(api.load_projectors(base, tmp_path / "ours").model), wanted)
    # A model of one tower takes the first one's alone.
    plain = api.load_projectors(loaded_of(CONFIGS["clip"]), files)
    assert_equal(projectors(plain.model), {p: x for p, x in wanted.items() if p[0] == "p"})


def equal_width():
    return dataclasses.replace(tiny_llava.DINOV2, width=24, heads=2, mlp_dim=96)


def test_projectors_that_do_not_fit_are_named(tmp_path):
    imof, clip = loaded_of(CONFIGS["imof"]), loaded_of(CONFIGS["clip"])
    files = stage_one(tmp_path / "one", clip)
    with pytest.raises(CheckpointError, match=r"missing model\.dino_mm_projector\.0\.weight"):
        api.load_projectors(imof, files)
    torch_files.save(tmp_path / "mm_projector.bin", {"other.weight": np.ones((2, 2))})
    with pytest.raises(CheckpointError, match=r"such as model\.mm_projector\.0\.weight"):
        api.load_projectors(clip, tmp_path / "mm_projector.bin")
    with pytest.raises(ConfigError, match="expected a LLaVA"):
        api.load_projectors(tiny_llama.loaded(), files)
    settings = architecture("llava").write_config["reference"](CONFIGS["clip"])
    (files / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"4 tensors of its projectors alone.*assemble_llava"):
        perception_jax.load(files)


# --- Put together ---------------------------------------------------------------------------------


def parts(tmp_path):
    """A language model, a CLIP and a DINOv2 in folders of their own."""
    language = tiny_llama.loaded(context=128)
    model = drawn(lambda: Llama(language.config, rngs=nnx.Rngs(params=0)), seed=3)
    language = dataclasses.replace(language, model=model)
    api.export(language, tmp_path / "vicuna")
    export_tower(tmp_path / "clip", whole=True)
    config = dataclasses.replace(tiny_llava.DINOV2, position_offset=0.0)
    dino = drawn(lambda: Dinov2(config, rngs=nnx.Rngs(params=0)), seed=4)
    processor = Processor(image=ImageProcessor(size=24), tokenizer=None)
    api.export(Loaded(model=dino, config=config, processor=processor), tmp_path / "dino")
    return language, dino


def test_a_llava_is_assembled_from_its_parts(tmp_path):
    language, dino = parts(tmp_path)
    towers = [tmp_path / "clip", tmp_path / "dino"]
    opened = api.assemble_llava(tmp_path / "vicuna", towers, image_aspect="pad")
    assert opened.config.mixing == "interleaved"
    assert opened.config.towers == (tiny_llava.CLIP, tiny_llava.DINOV2)  # with the offset
    found = opened.load_weights()
    leaves = flatten(found.model)
    assert_equal(flatten(found.model.language), flatten(language.model))
    assert_equal(flatten(found.model.second_vision), flatten(dino))
    assert_equal(flatten(found.model.vision), flatten(loaded_of(CONFIGS["clip"]).model.vision))
    bound = 24**-0.5
    kernels = [leaves[f"{name}/fc1/kernel"] for name in ("projector", "second_projector")]
    assert 0.8 * bound < np.abs(kernels[0]).max() <= bound
    assert np.abs(kernels[1]).max() <= 64**-0.5
    again = flatten(api.assemble_llava(tmp_path / "vicuna", towers, seed=1).load_weights().model)
    assert not np.array_equal(again["projector/fc1/kernel"], kernels[0])
    assert found.processor.image.mode == "llava_pad"
    with pytest.raises(ConfigError, match="of the Llama family, found a Clip"):
        api.assemble_llava(tmp_path / "clip", towers)


def test_the_shipped_clip_is_an_image_tower(tmp_path):
    parts(tmp_path)
    opened = api.assemble_llava(tmp_path / "vicuna", ["scenes-clip"], projector="linear")
    assert opened.config.tokens_per_image == 16
    mesh = jax.make_mesh((1, 2, 1), ("replica", "fsdp", "tensor"))
    found = opened.load_weights(dtype="bfloat16", mesh=mesh)
    shipped = flatten(perception_jax.load("scenes-clip", dtype="bfloat16").model)
    leaves = flatten(found.model)
    for path in (p for p in leaves if p.startswith("vision/")):
        np.testing.assert_array_equal(leaves[path], shipped[path])
    assert {str(leaf.dtype) for leaf in leaves.values()} == {"bfloat16"}


def test_a_folder_with_lora_brings_its_parts_together(tmp_path):
    """`adapter_model.bin` and `non_lora_trainables.bin` beside the settings of the whole."""
    parts(tmp_path)
    whole = api.assemble_llava(
        *(tmp_path / "vicuna", [tmp_path / "clip"]), image_aspect="pad", seed=5
    ).load_weights()
    lora = LoraConfig(rank=2, alpha=4.0)
    model = add_lora(whole.model, lora, ["language/.*/[qv]_proj"], rngs=nnx.Rngs(params=1))
    rng = np.random.default_rng(0)
    leaves = {
        path: jax.numpy.asarray(rng.normal(size=x.shape), x.dtype) if "/lora/b" in path else x
        for path, x in flatten(model).items()
    }
    adapted = dataclasses.replace(whole, model=unflatten(model, leaves))
    folder = tmp_path / "llava-lora"
    api.save_lora(adapted, folder, base=str(tmp_path / "vicuna"))
    named = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in named
    torch_files.save(folder / "adapter_model.bin", named)
    (folder / "adapter_model.safetensors").unlink()
    extra = {
        f"base_model.model.model.mm_projector.{2 * k - 2}.{theirs}": np.asarray(
            leaves[f"projector/fc{k}/{own}"]
        ).T
        for k in (1, 2)
        for theirs, own in (("weight", "kernel"), ("bias", "bias"))
    }
    torch_files.save(folder / "non_lora_trainables.bin", extra)
    settings = architecture("llava").write_config["reference"](whole.config)
    settings = {k: v for k, v in settings.items() if k != "vision_config"}
    settings["mm_vision_tower"] = str(tmp_path / "clip")
    (folder / "config.json").write_text(json.dumps(settings))
    found = api.load_llava_lora(folder)
    with pytest.raises(CheckpointError, match=r"LoRA with a projector.*load_llava_lora"):
        perception_jax.load(folder)
    assert found.config == whole.config
    assert_equal(flatten(found.model), leaves)
    ids = np.array([[1, *[IMAGE] * 9, 7, 8]], np.int32)
    images = rng.normal(size=(1, 1, 24, 24, 3)).astype(np.float32)
    run = jax.jit(lambda m: m(ids, None, images).logits)
    np.testing.assert_allclose(run(merge_lora(found.model)), run(adapted.model), atol=1e-4)
