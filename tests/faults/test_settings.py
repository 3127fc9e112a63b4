"""Settings files with one nonsensical value at a time: a clear error, or a key that is not read."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pytest

from perception_jax.data import processor_formats
from perception_jax.errors import PerceptionError
from perception_jax.models.clip.config import ClipConfig
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.eva.config import EvaConfig
from perception_jax.models.registry import architecture_of
from perception_jax.models.siglip.config import SiglipConfig


def exact_gelu(config):
    """As timm, whose name stands in open_clip's settings, runs a SigLIP."""
    towers = {name: getattr(config, name) for name in ("vision", "text")}
    exact = {name: dataclasses.replace(tower, act="gelu") for name, tower in towers.items()}
    return dataclasses.replace(config, **exact)


CONFIGS = {
    "clip": ClipConfig.vit_b32(),
    "siglip": exact_gelu(SiglipConfig.so400m_224()),
    "eva": EvaConfig.eva02_l14(),
    "dinov2": Dinov2Config.small(),
}
DEEP = []
for _ in range(200):
    DEEP = [DEEP]
# What no number of a model or image can be.
NONSENSE = (
    "x", "", "12", [], {}, {"a": 1}, [3.0, "y"], math.nan, math.inf, -math.inf, -1, 10**400, 1e300,
    -0.5, DEEP, "\ud800" * 3,
)  # fmt: skip
SIGNED = ("logit_scale_init_value", "layerscale_value")
"""Keys whose values may be any finite number."""
OTHERS = (None, True, False, 0, 1, 3, 2**31, 0.5, "gelu")
PROCESSOR = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
    "do_convert_rgb": True,
}


def places(settings, path=()):
    """Paths of all values in nested dicts and lists, containers too."""
    items = settings.items() if isinstance(settings, dict) else enumerate(settings)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def changed(settings, path, value):
    """A copy with another value at one place, and what stood there."""
    other = copy.deepcopy(settings)
    inner = other
    for key in path[:-1]:
        inner = inner[key]
    before, inner[path[-1]] = inner[path[-1]], copy.deepcopy(value)
    return other, before


def readers():
    for name, config in CONFIGS.items():
        arch = architecture_of(config)
        for layout, read in arch.read_config.items():
            write = arch.write_config.get(layout)
            settings = None if write is None else write(config)
            if settings:
                yield pytest.param(read, settings, id=f"{name}-{layout}")
    yield pytest.param(lambda one: processor_formats.from_hf(one), PROCESSOR, id="processor")


@pytest.mark.parametrize(("read", "settings"), list(readers()))
def test_one_nonsensical_value_is_refused_or_belongs_to_a_key_not_read(read, settings):
    expected = read(settings)
    messages = []
    for path, value in itertools.product(list(places(settings)), NONSENSE + OTHERS):
        other, before = changed(settings, path, value)
        number = isinstance(before, int | float) and not isinstance(before, bool)
        try:
            found = read(other)
        except PerceptionError as error:
            messages.append(str(error))
            continue
        except Exception as error:
            pytest.fail(f"{path} = {value!r:.80}: {type(error).__name__}: {error!s:.200}")
        if path[-1] in SIGNED and value in (-1, -0.5):
            continue
        if number and any(value is nonsense for nonsense in NONSENSE):
            assert found == expected, f"{path} = {value!r:.80} was taken for a setting"
    assert len(messages) > 40
    assert max(map(len, messages)) < 1000
