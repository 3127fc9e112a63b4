"""Every published encoder by shape alone: parameter counts and complete key tables."""

from __future__ import annotations

import dataclasses

import pytest
from flax import nnx

from perception_jax.api import Loaded, Processor, export
from perception_jax.data.processors import ImageProcessor
from perception_jax.errors import ConfigError
from perception_jax.interop.plan import bind
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.eva.config import EvaConfig
from perception_jax.models.params import flatten
from perception_jax.models.registry import architecture_of
from perception_jax.models.siglip.config import SiglipConfig
from perception_jax.shard.mesh import make_mesh
from perception_jax.shard.rules import shardings

# Millions of parameters: the MMVP-VLM table (arXiv 2401.06209), open_clip's model profiles, and
# for DINOv2 the authors' model card (21, 86, 300 and 1,100 M).
PUBLISHED = {
    "SigLIP SO400M/14 224": (SiglipConfig.so400m_224(), 877.4),
    "SigLIP SO400M/14 384": (SiglipConfig.so400m_384(), 878.0),
    "EVA01-g/14": (EvaConfig.eva01_g14(), 1136.4),
    "EVA01-g/14-plus": (EvaConfig.eva01_g14_plus(), 1366.6),
    "EVA02-L/14": (EvaConfig.eva02_l14(), 427.8),
    "EVA02-E/14": (EvaConfig.eva02_e14(), 4704.6),
    "EVA02-E/14-plus": (EvaConfig.eva02_e14_plus(), 5044.9),
    "DINOv2-S": (Dinov2Config.small(), 22.1),
    "DINOv2-B": (Dinov2Config.base(), 86.6),
    "DINOv2-L": (Dinov2Config.large(), 304.4),
    "DINOv2-g": (Dinov2Config.giant(), 1136.5),
    "DINOv2-L with registers": (Dinov2Config.large(registers=4), 304.4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size_by_shape_alone(name):
    config, millions = PUBLISHED[name]
    arch = architecture_of(config)
    leaves = flatten(nnx.eval_shape(lambda: arch.build(config, rngs=nnx.Rngs(params=0))))
    assert round(sum(leaf.size for leaf in leaves.values()) / 1e6, 1) == millions
    for table in arch.tables.values():  # raises unless every leaf is covered exactly once
        bind(table(config), {path: leaf.shape for path, leaf in leaves.items()})
    for mesh in (make_mesh(1, 8, 1), make_mesh(2, 2, 2)):
        assert shardings(leaves, arch.shardings, mesh).keys() == leaves.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_configuration_survives_its_formats(name):
    config, _ = PUBLISHED[name]
    arch = architecture_of(config)
    for layout, read in arch.read_config.items():
        if name.startswith("SigLIP") and layout == "reference":
            continue  # open_clip runs SigLIP with another activation: see below
        assert read(arch.write_config[layout](config)) == config


def test_siglip_for_open_clip_has_the_exact_gelu():
    config = SiglipConfig.so400m_384()
    with pytest.raises(ConfigError, match="exact GELU"):
        config.to_open_clip()
    exact = SiglipConfig(
        vision=dataclasses.replace(config.vision, act="gelu"),
        text=dataclasses.replace(config.text, act="gelu"),
    )
    assert SiglipConfig.from_open_clip(exact.to_open_clip()) == exact


@pytest.mark.parametrize(
    ("config", "layout"), [(EvaConfig.eva02_b16(), "jax"), (Dinov2Config.small(), "reference")]
)
def test_a_layout_that_an_architecture_lacks_is_named(tmp_path, config, layout):
    arch = architecture_of(config)
    model = nnx.eval_shape(lambda: arch.build(config, rngs=nnx.Rngs(params=0)))
    processor = Processor(image=ImageProcessor(size=224), tokenizer=None)
    loaded = Loaded(model=model, config=config, processor=processor)
    with pytest.raises(ConfigError, match=f"{arch.name} has no configuration file .*{layout}"):
        export(loaded, tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()
