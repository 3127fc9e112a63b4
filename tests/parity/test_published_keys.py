"""Key tables of the published sizes against the models that PyTorch's own code builds: every name
and every shape, without memory for weights (torch's meta device)."""

from __future__ import annotations

import math

import pytest
from flax import nnx

from perception_jax.interop.binding import source_shapes
from perception_jax.interop.rules import RuleTable
from perception_jax.models.identify import identify
from perception_jax.models.llava.config import LlavaConfig
from perception_jax.models.params import flatten
from perception_jax.models.registry import architecture
from tests.parity.measures import Row
from tests.parity.torch_code import open_clip, timm

torch = pytest.importorskip("torch")

OPEN_CLIP = (
    "ViT-B-16-quickgelu",
    "ViT-L-14-336-quickgelu",
    "ViT-H-14-378-quickgelu",
    "ViT-H-14",
    "ViT-g-14",
    "ViT-bigG-14",
    "ViT-SO400M-14-SigLIP",
    "ViT-SO400M-14-SigLIP-384",
    "ViT-B-16-SigLIP-512",
    "ViT-L-16-SigLIP-256",
    "ViT-L-16-SigLIP2-512",
    "ViT-gopt-16-SigLIP2-256",
    "EVA01-g-14",
    "EVA01-g-14-plus",
    "EVA02-B-16",
    "EVA02-L-14-336",
    "EVA02-E-14",
    "EVA02-E-14-plus",
)
TIMM = {
    "vit_base_patch32_clip_quickgelu_224": 512,
    "vit_large_patch14_clip_336": 768,
    "vit_huge_patch14_clip_quickgelu_378": 1024,
    "vit_giant_patch14_clip_224": 1024,
    "vit_gigantic_patch14_clip_224": 0,
    "vit_base_patch16_siglip_512": 0,
    "vit_large_patch16_siglip_384": 0,
    "vit_so400m_patch14_siglip_378": 0,
    "vit_giantopt_patch16_siglip_256": 0,
    "eva_giant_patch14_clip_224": 1024,
    "eva02_base_patch16_clip_224": 512,
    "eva02_large_patch14_clip_336": 768,
    "eva02_enormous_patch14_clip_224": 1024,
    "vit_small_patch14_dinov2": 0,
    "vit_base_patch14_reg4_dinov2": 0,
    "vit_large_patch14_dinov2": 0,
    "vit_giant_patch14_reg4_dinov2": 0,
}
SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}
GIANT = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24}
HUGGING_FACE = {
    "CLIP B/16": ("CLIP", {"vision_config": {"patch_size": 16}}),
    "SigLIP SO400M/14 384": (
        "Siglip",
        {
            "vision_config": SO400M | {"image_size": 384, "patch_size": 14},
            "text_config": SO400M | {"projection_size": 1152},
        },
    ),
    "DINOv2-g": ("Dinov2", GIANT | {"image_size": 518, "use_swiglu_ffn": True}),
    "DINOv2-S with registers": (
        "Dinov2WithRegisters",
        {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518},
    ),
}

LLAVA = {
    "LLaVA-1.5 7B": LlavaConfig.llava15_7b(),
    "LLaVA-1.5 13B": LlavaConfig.llava15_13b(),
}


def shapes_of(weights) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}


def ours(settings, layout: str, theirs: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    found = identify(settings, layout, theirs)
    arch, config = found.architecture, found.config
    leaves = flatten(nnx.eval_shape(lambda: arch.build(config, rngs=nnx.Rngs(params=0))))
    table: RuleTable = arch.tables[layout](config)
    return source_shapes(table, {path: leaf.shape for path, leaf in leaves.items()})


def note(model: str, names: str, shapes: dict[str, tuple[int, ...]]) -> None:
    parameters = sum(math.prod(shape) for shape in shapes.values())
    Row(model, names, tensors=len(shapes), parameters=parameters)


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip(name):
    code = open_clip()
    settings = code.get_model_config(name)
    kind = code.CustomTextCLIP if settings.get("custom_text") else code.CLIP
    with torch.device("meta"):
        model = kind(**{key: value for key, value in settings.items() if key != "custom_text"})
    theirs = shapes_of(model.state_dict())
    assert ours(settings, "reference", theirs) == theirs
    note(name, "open_clip", theirs)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    with torch.device("meta"):
        model = timm().create_model(name, num_classes=TIMM[name])
    theirs = shapes_of(model.state_dict())
    settings = {"architecture": name, "pretrained_cfg": dict(model.pretrained_cfg)}
    assert ours(settings, "timm", theirs) == theirs
    note(name, "timm", theirs)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_transformers(name):
    transformers = pytest.importorskip("transformers")
    from transformers.core_model_loading import revert_weight_conversion

    family, settings = HUGGING_FACE[name]
    config = getattr(transformers, f"{family}Config")(**settings)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}Model")(config)
    # DINOv2's projections have other names in memory than in files.
    theirs = shapes_of(revert_weight_conversion(model, model.state_dict()))
    assert ours(config.to_dict(), "hf", theirs) == theirs
    note(name, "Hugging Face", theirs)


@pytest.mark.parametrize("name", LLAVA)
def test_llava(name):
    """As transformers makes the files: its own spelling, which we read, and the older one, which we
    write."""
    transformers = pytest.importorskip("transformers")
    config = LLAVA[name].with_image_token()
    settings = architecture("llava").write_config["hf"](config)
    with torch.device("meta"):
        made = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**settings))
    table = architecture("llava").tables["hf"](config)
    theirs = {table.rename(key): shape for key, shape in shapes_of(made.state_dict()).items()}
    assert ours(settings, "hf", theirs) == theirs
    note(name, "llava-hf", theirs)
