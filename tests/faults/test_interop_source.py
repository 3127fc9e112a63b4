"""What `load` refuses: damaged, foreign and hostile checkpoints and settings, each with one error
that says what is wrong and where."""

from __future__ import annotations

import io
import json
import pathlib
import pickle
import zipfile

import numpy as np
import pytest

import perception_jax
from perception_jax.errors import CheckpointError, ConfigError, PerceptionError
from perception_jax.models.identify import identify
from tests import torch_files

WIDTH, DEPTH = 64, 1


def dinov2() -> dict[str, np.ndarray]:
    """Tensors named as the authors do, of a tiny DINOv2."""
    rng = np.random.default_rng(0)
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "mask_token": (1, WIDTH),
        "pos_embed": (1, 5, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 2, 2),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for block in (f"blocks.{k}" for k in range(DEPTH)):
        shapes |= {
            f"{block}.{n}.{p}": (WIDTH,) for n in ("norm1", "norm2") for p in ("weight", "bias")
        }
        shapes |= {f"{block}.ls{k}.gamma": (WIDTH,) for k in (1, 2)}
        for name, out, into in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", 8, WIDTH),
            ("mlp.fc2", WIDTH, 8),
        ):
            shapes |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def file(tmp_path) -> pathlib.Path:
    path = torch_files.save(tmp_path / "dinov2_vits14_pretrain.pth", dinov2())
    perception_jax.load(path)  # whole, it loads
    return path


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file(file, keep):
    raw = file.read_bytes()
    file.write_bytes(raw[: int(keep * len(raw))])
    with pytest.raises(CheckpointError, match=file.name):
        perception_jax.load(file)


def test_flipped_bits_are_noticed(file):
    """The archive has checksums: no flip gives other numbers. (Most bytes are tensors.)"""
    raw = file.read_bytes()
    expected = dinov2()["pos_embed"]
    for position in range(0, len(raw), len(raw) // 23):
        damaged = bytearray(raw)
        damaged[position] ^= 0x10
        file.write_bytes(damaged)
        try:
            loaded = perception_jax.load(file)
        except PerceptionError:
            continue
        np.testing.assert_array_equal(loaded.model.position_embedding[...], expected[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pos_embed": (1, 6, WIDTH)}, ConfigError, "6 positions are no square grid"),
        ({"cls_token": (1, 1, 63)}, ConfigError, "63 is no multiple of 64"),
        ({"cls_token": ()}, ConfigError, "shapes are not"),
        ({"blocks.0.mlp.fc2.weight": None}, ConfigError, "blocks.0.mlp.fc2.weight"),
        ({"norm.weight": (WIDTH + 1,)}, CheckpointError, r"norm\.weight has shape \(65,\)"),
        ({"norm.bias": None}, CheckpointError, r"missing norm\.bias"),
        ({"head.weight": (2, 2)}, CheckpointError, r"unknown head\.weight"),
    ],
)
def test_wrong_shapes_and_names(tmp_path, change, error, message):
    arrays = dinov2()
    for name, shape in change.items():
        if shape is None:
            del arrays[name]
        else:
            arrays[name] = np.zeros(shape, np.float32)
    with pytest.raises(error, match=message):
        perception_jax.load(torch_files.save(tmp_path / "x.pth", arrays))


def test_a_foreign_model_is_not_taken_for_one_of_ours(tmp_path):
    bert = {"embeddings.word_embeddings.weight": np.zeros((3, 2)), "pooler.bias": np.zeros(2)}
    with pytest.raises(CheckpointError, match=r"2 tensors \(e\.g\. embeddings\.word.*`config`"):
        perception_jax.load(torch_files.save(tmp_path / "pytorch_model.bin", bert))
    settings = {"model_type": "dinov2", "hidden_size": WIDTH, "num_attention_heads": 1}
    with pytest.raises(CheckpointError, match="unknown: 2, missing: "):
        perception_jax.load(tmp_path / "pytorch_model.bin", config=settings)


class Attack:
    """Unpickled by Python, this writes a file."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "dinov2_vits14_pretrain.pth"])
def test_a_hostile_pickle_is_refused_before_anything_runs(tmp_path, name):
    proof = tmp_path / "proof"
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"cls_token": Attack(proof)}))
    (tmp_path / name).write_bytes(content.getvalue())
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match="found the global pathlib"):
            perception_jax.load(source, config={"model_type": "dinov2"})
    assert not proof.exists()


OPEN_CLIP = {
    "embed_dim": 4,
    "vision_cfg": {"layers": 1, "width": 64, "image_size": 8, "patch_size": 4},
    "text_cfg": {"width": 64, "layers": 1, "heads": 1},
}


def vision(**change):
    return OPEN_CLIP | {"vision_cfg": OPEN_CLIP["vision_cfg"] | change}


def text(**change):
    return OPEN_CLIP | {"text_cfg": OPEN_CLIP["text_cfg"] | change}


@pytest.mark.parametrize(
    ("settings", "layout", "message"),
    [
        ({"model_type": "bert"}, "hf", "no architecture is called 'bert'"),
        ({"model_type": "idefics2", "vision_config": {}}, "hf", "'idefics2' here.*`prefix`"),
        ({"model_type": "clip", "vision_config": {"hidden_size": "wide"}}, "hf", "text_config"),
        ({"model_type": "dinov2", "mlp_ratio": "big"}, "hf", "mlp_ratio: expected a finite number"),
        ({"model_type": "clip_vision_model", "hidden_act": "relu"}, "hf", "found 'relu'"),
        ({"model_type": "siglip_vision_model", "hidden_act": "relu"}, "hf", "found 'relu'"),
        ({"model_type": "eva"}, "hf", "eva has no configuration file in the layout 'hf'"),
        ({"model_type": ["clip"]}, "hf", "cannot be read"),
        ({"model_cfg": {}}, "reference", "the key .vision_cfg."),
        ({"model_cfg": [1]}, "reference", "model_cfg: expected an object"),
        (vision(no_ln_pre=True), "reference", "no_ln_pre"),
        (vision(pool_type="avg"), "reference", "pool_type"),
        (vision(layers=[1, 2]), "reference", "no plain ViT image tower"),
        (vision(timm_model_name="convnext_base"), "reference", "'convnext_base'.*not supported"),
        (vision(timm_model_name="eva02_large_patch14_448"), "reference", "timm"),
        (text(hf_model_name="roberta-base"), "reference", "hf_model_name"),
        (text(no_causal_mask=True), "reference", "no_causal_mask"),
        ({"architecture": "resnet50"}, "timm", "'resnet50' is not supported"),
        ({"architecture": ""}, "timm", "the model of '' is not supported"),
        ({"model_type": "x" * 10**6}, "hf", "^no architecture is called '[x.]{,120}' here"),
        ({"architecture": "vit_base_patch16_siglip_gap_224"}, "timm", "is not supported"),
        ({"architecture": "vit_pico_patch16_clip_224"}, "timm", "'vit_pico_patch16_clip_224'"),
        (
            {"architecture": "vit_small_patch14_dinov2", "model_args": {"qk_norm": True}},
            "timm",
            "qk_norm",
        ),
        (
            {"architecture": "vit_base_patch16_clip_224", "model_args": {"act_layer": "relu"}},
            "timm",
            "'relu'",
        ),
        (
            {"architecture": "vit_base_patch16_clip_224", "model_args": {"img_size": [8, 9]}},
            "timm",
            "square img_size",
        ),
    ],
)
def test_settings_that_make_another_model_or_no_sense(settings, layout, message):
    with pytest.raises(ConfigError, match=message):
        identify(settings, layout, {})


def test_a_classifier_is_not_taken_for_an_embedding(tmp_path):
    """timm's fine-tuned CLIPs have a biased head where CLIP has its projection."""
    from perception_jax.interop.safetensors_io import write_safetensors
    from perception_jax.interop.tensors import LazyTensor, TensorSpec

    arrays = {"head.weight": np.ones((3, 64), np.float32), "head.bias": np.ones(3, np.float32)}
    write_safetensors(
        tmp_path / "model.safetensors",
        [LazyTensor(n, TensorSpec(a.shape, a.dtype), lambda a=a: a) for n, a in arrays.items()],
    )
    settings = {
        "architecture": "vit_base_patch16_clip_224",
        "model_args": {"img_size": 32, "embed_dim": 64, "depth": 1, "num_heads": 1},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"head\.bias differs from the configuration"):
        perception_jax.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\xff", '{"perception_jax_layout": "npz"}'])
def test_damaged_settings(tmp_path, content):
    torch_files.save(tmp_path / "model.bin", dinov2())
    (tmp_path / "config.json").write_bytes(content.encode("latin1"))
    with pytest.raises(CheckpointError, match=r"config\.json|perception_jax_layout"):
        perception_jax.load(tmp_path)


def test_settings_that_are_not_there(tmp_path):
    file = torch_files.save(tmp_path / "model.bin", {"w": np.zeros(2)})
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json or open_clip_config\.json in .*empty"):
        perception_jax.load(file, config=tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"missing\.json"):
        perception_jax.load(file, config=tmp_path / "missing.json")
