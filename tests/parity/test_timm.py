"""DINOv2 and image towers both ways against timm's own models, with random tiny weights.

timm writes the folder, we load and export it, and timm loads the export with every name matched.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import perception_jax
from tests.arrays import run
from tests.parity.measures import Row
from tests.parity.torch_code import assert_bit_equal, channels_first, randomised, timm

torch = pytest.importorskip("torch")

TINY = {"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 2, "num_heads": 3}
WIDE = TINY | {"embed_dim": 64, "num_heads": 1}  # heads of 64, as every DINOv2 has
MODELS = {
    "vit_base_patch16_clip_224": TINY | {"num_classes": 20},
    "vit_large_patch14_clip_quickgelu_336": TINY | {"num_classes": 0, "mlp_ratio": 3.1},
    "vit_so400m_patch14_siglip_384": TINY | {"num_classes": 0},
    "vit_base_patch32_siglip_256": TINY | {"num_classes": 0},  # with the tanh form of GELU
    "eva_giant_patch14_clip_224": TINY | {"num_classes": 20},
    "eva02_enormous_patch14_clip_224": TINY | {"num_classes": 20},
    "eva02_large_patch14_clip_336": TINY | {"num_classes": 20},
    "eva02_base_patch16_clip_224": TINY | {"num_classes": 0},
    "vit_small_patch14_dinov2": WIDE | {"num_classes": 0},
    "vit_base_patch14_reg4_dinov2": WIDE | {"num_classes": 0},
    "vit_large_patch14_reg4_dinov2": WIDE | {"num_classes": 0, "reg_tokens": 2},
    "vit_giant_patch14_dinov2": WIDE | {"num_classes": 0, "mlp_ratio": 4.0},
}


def assert_same_outputs(row, model, theirs, sizes, *, final_norm=True):
    for height, width in sizes:
        rng = np.random.default_rng(height)
        pixels = rng.normal(size=(2, height, width, 3)).astype(np.float32)
        out = run(model, jnp.asarray(pixels))
        with torch.no_grad():
            tokens = theirs.forward_features(channels_first(pixels))
            pooled = theirs.forward_head(tokens)
        row.close(out.embedding, pooled)
        if final_norm:  # CLIP's tokens have none here, as in Hugging Face
            row.close(out.tokens, tokens)


@pytest.mark.parametrize("name", MODELS)
def test_both_ways_at_its_own_and_another_size(tmp_path, name):
    code = timm()
    theirs = randomised(code.create_model(name, **MODELS[name]))
    clip = "_clip_" in name and name.startswith("vit")
    if clip and MODELS[name]["num_classes"]:
        torch.nn.init.zeros_(theirs.head.bias)  # as in every conversion of a CLIP
    binary = name.startswith("eva")  # half of them as pickled files
    code.models.save_for_hf(theirs, tmp_path / "theirs", safe_serialization=not binary)
    loaded = perception_jax.load(tmp_path / "theirs")
    dynamic = code.create_model(name, **MODELS[name], dynamic_img_size=True).eval()
    dynamic.load_state_dict(theirs.state_dict())
    row = Row(f"tiny {name}", "timm", "timm, two image sizes")
    row.read(loaded.report)
    assert_same_outputs(row, loaded.model, dynamic, ((28, 28), (42, 35)), final_norm=not clip)
    assert loaded.processor.image.size == 28

    perception_jax.export(loaded, tmp_path / "ours", layout="timm")
    again = code.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    assert_bit_equal(theirs, again)
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(theirs(pixels), again(pixels))
    row.both_ways = True


@pytest.mark.parametrize("registers", [0, 4])
def test_the_authors_dinov2_file_without_settings(tmp_path, registers):
    """timm reads the same file through a converter of its own."""
    code = timm()
    name = f"vit_small_patch14_{'reg4_' if registers else ''}dinov2"
    theirs = randomised(code.create_model(name, **WIDE, num_classes=0))
    file = {key: value.clone() for key, value in theirs.state_dict().items()}
    file["mask_token"] = torch.randn(1, 64)
    if registers:
        position = torch.randn(1, 1, 64)
        file["register_tokens"] = file.pop("reg_token")
        file["cls_token"] = file["cls_token"] - position
        file["pos_embed"] = torch.cat([position, file["pos_embed"]], 1)
    path = tmp_path / f"dinov2_vits14_{'reg4_' if registers else ''}pretrain.pth"
    torch.save(file, path)

    from timm.models import load_checkpoint
    from timm.models.vision_transformer import checkpoint_filter_fn

    load_checkpoint(theirs, path, filter_fn=checkpoint_filter_fn)
    loaded = perception_jax.load(path)
    config = loaded.config
    assert (config.registers, config.heads, config.image_size) == (registers, 1, 28)
    assert config.position_offset == (0.0 if registers else 0.1)
    assert (loaded.processor.image.size, loaded.processor.image.resize) == (224, 256)
    row = Row(f"tiny DINOv2, {registers} registers, .pth", "the authors'", "timm's converter")
    row.read(loaded.report)
    assert_same_outputs(row, loaded.model, theirs, ((28, 28),))

    perception_jax.export(loaded, tmp_path / "again", layout="reference")
    again = perception_jax.interop.open_checkpoint(tmp_path / "again")
    assert again.keys() == file.keys()
    for key, value in file.items():
        np.testing.assert_array_equal(again[key], value)
    perception_jax.export(loaded, tmp_path / "timm", layout="timm")
    converted = code.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert_bit_equal(theirs, converted)
    row.both_ways = True
