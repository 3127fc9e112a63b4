"""An architecture is a folder and a line in a list; parts of models are recognised by names."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from flax import nnx

import perception_jax
from perception_jax.api import Loaded, Processor
from perception_jax.data.processors import ImageProcessor
from perception_jax.errors import ConfigError
from perception_jax.interop.binding import source_shapes
from perception_jax.models import registry
from perception_jax.models.clip.config import ClipConfig, VisionConfig
from perception_jax.models.identify import identify
from perception_jax.models.params import flatten
from perception_jax.nn.text_tower import TextConfig
from perception_jax.shard.mesh import make_mesh
from tests.toy_model.config import ToyConfig
from tests.toy_model.modeling import Toy

TOY = "tests.toy_model.architecture"


@pytest.fixture
def toy(monkeypatch) -> None:
    monkeypatch.setattr(registry, "MODULES", list(registry.MODULES))
    registry.register(TOY)
    registry.register(TOY)
    assert registry.MODULES.count(TOY) == 1


@pytest.mark.usefixtures("toy")
def test_an_architecture_outside_the_library(tmp_path):
    """Loaded and exported in three layouts, from settings and from names, and onto a mesh."""
    config = ToyConfig(size=4, width=8)
    model = Toy(config, rngs=nnx.Rngs(params=0))
    processor = Processor(image=ImageProcessor(size=4, mode="squash"), tokenizer=None)
    made = Loaded(model=model, config=config, processor=processor)
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    expected = model(processor.images([image]))
    for layout in ("hf", "reference", "jax"):
        perception_jax.export(made, tmp_path / layout, layout=layout)
        again = perception_jax.load(tmp_path / layout)
        assert (again.config, again.processor) == (config, processor)
        np.testing.assert_array_equal(again.model(again.processor.images([image])), expected)
    assert [item.name for item in (tmp_path / "reference").iterdir()] == ["model.safetensors"]
    placed = perception_jax.load(tmp_path / "hf", mesh=make_mesh(1, 8, 1)).model
    assert placed.gain[...].sharding.spec == jax.sharding.PartitionSpec("fsdp")


def test_an_architecture_that_is_not_listed_is_not_found(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "toy"}))
    with pytest.raises(ConfigError, match=r"no architecture is called 'toy' here; there are: clip"):
        registry.architecture("toy")


def test_modules_are_imported_when_theirs_is_asked_for(monkeypatch):
    monkeypatch.setattr(registry, "MODULES", [registry.MODULES[0], "tests.no_such_module"])
    assert registry.architecture("clip").name == "clip"
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        registry.architecture("siglip")


def test_names_are_unique_and_parts_are_there():
    listed = list(registry.architectures())
    names = [name for item in listed for name in (item.name, *item.model_types)]
    assert len(names) == len(set(names))
    for item in listed:
        for part in item.parts:
            assert registry.architecture(part).tables.keys() >= item.tables.keys()


SIZES = {"width": 64, "depth": 2, "heads": 1, "mlp_dim": 72}
CLIP = ClipConfig(
    vision=VisionConfig(image_size=8, patch_size=4, **SIZES),
    text=TextConfig(vocab_size=20, context=5, **SIZES),
    embed_dim=4,
)
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1}
LLAVA = {"model_type": "llava", "vision_config": CLIP.vision.to_hf(), "text_config": LLAMA}
OTHER = LLAVA | {"text_config": {"model_type": "opt"}}
LANGUAGE = {
    "model.embed_tokens.weight": (100, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "lm_head.weight": (100, 64),
}


def names_of(config, layout: str = "hf") -> dict[str, tuple[int, ...]]:
    arch = registry.architecture_of(config)
    leaves = flatten(nnx.eval_shape(lambda: arch.build(config, rngs=nnx.Rngs(params=0))))
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    return source_shapes(arch.table(layout, config, shapes), shapes)


def below(names: dict[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {k.removeprefix(prefix): v for k, v in names.items() if k.startswith(prefix)}


@pytest.mark.parametrize(
    ("settings", "layout", "prefix", "expected"),
    [
        (CLIP.to_hf(), "hf", "vision_model.", "clip_vision_model"),
        (CLIP.to_hf(), "hf", "", "clip"),
        (LLAVA, "hf", "vision_model.", "clip_vision_model"),
        ({"model_type": "emu", "vision_config": CLIP.to_hf()}, "hf", "", "clip"),
        ({"model_cfg": CLIP.to_open_clip()}, "reference", "visual.", "clip_vision_model"),
        (CLIP.to_hf() | {"model_type": "clip"}, "jax", "vision/", "clip_vision_model"),
    ],
)
def test_a_part_is_told_by_its_names(settings, layout, prefix, expected):
    names = below(names_of(CLIP, layout), prefix)
    assert identify(settings, layout, names, part=True).architecture.name == expected


def test_a_part_that_is_not_built_here_is_not_taken_for_another():
    """A multimodal model's language model and projector."""
    for names in (LANGUAGE, {"linear_1.weight": (4, 4), "linear_1.bias": (4,)}):
        with pytest.raises(ConfigError, match=r"clip_vision_model.*called 'opt' here") as caught:
            identify(OTHER, "hf", names, part=True)
        assert next(iter(names)) in str(caught.value)
    assert identify(LLAVA, "hf", LANGUAGE, part=True).architecture.name == "llama"
