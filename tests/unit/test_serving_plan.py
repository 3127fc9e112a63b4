"""Plans of serving a language model, on CPU devices in place of a slice's."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest

from launch import common, plan, plan_text
from perception_jax.api.language import language_config
from perception_jax.errors import ConfigError
from perception_jax.ops.sharding import constrain
from perception_jax.shard.mesh import MeshConfig
from perception_jax.systems.text import serving
from perception_jax.testing.tiny_llama import CONFIG
from tests.slices import cpu_slice, tpu_test

WIDE = dataclasses.replace(CONFIG, heads=8, kv_heads=8, vocab_size=112, depth=2)
"""As many heads as chips; no two of its sizes are equal."""
SLICE = cpu_slice(ici_bandwidth=1e12)
SERVING = serving.Serving(batch_size=12, prompt=16, context=64, dtype="float32")


def planned(config=WIDE, chips=8, **changes):
    settings = dataclasses.replace(SERVING, **changes)
    found = dataclasses.replace(SLICE, chips=chips)
    return serving.serving_plans(config, settings, found, jax.devices()[:chips])


@pytest.fixture(scope="module")
def one():
    return planned(chips=1)


@pytest.fixture(scope="module")
def split():
    return planned()


def parameters(config) -> int:
    attention = config.width * config.head_width * (2 * config.heads + 2 * config.kv_heads)
    layer = attention + 3 * config.width * config.mlp_dim + 2 * config.width
    return config.depth * layer + config.width + 2 * config.vocab_size * config.width


def test_numbers_of_a_plan(one):
    prefill, decode = one
    assert (prefill.kind, decode.kind) == ("prefill", "decode")
    weights = 4 * parameters(WIDE)
    cache = 2 * WIDE.depth * 12 * WIDE.kv_heads * 64 * WIDE.head_width * 4
    assert prefill.weight_bytes == decode.weight_bytes == weights
    assert prefill.cache_bytes == decode.cache_bytes == cache
    assert decode.argument_bytes == pytest.approx(weights + cache, rel=0.02)
    assert prefill.argument_bytes == pytest.approx(weights, rel=0.02)
    assert (prefill.tokens, decode.tokens) == (12 * 16, 12)
    # The table is looked up: only few of its rows are read.
    table = 4 * WIDE.vocab_size * WIDE.width
    assert decode.memory_seconds == (weights + cache - table) / SLICE.hbm_bandwidth
    # Two FLOPs for each weight of a product, and those of attention over all places.
    products = parameters(WIDE) - WIDE.width * (WIDE.vocab_size + 2 * WIDE.depth + 1)
    attention = 4 * WIDE.depth * WIDE.heads * WIDE.head_width * 64
    assert decode.hardware_flops == 12 * (2 * products + attention)
    assert decode.step_seconds == decode.memory_seconds
    assert decode.tokens_per_second == pytest.approx(12 / decode.memory_seconds)
    assert decode.fits
    assert decode.collective_bytes == {}


def test_the_cache_exists_once():
    """Both steps write in place: the prefill to the cache that it returns, and not to a smaller one
    that is then copied, and the loop to its own."""
    prefill, decode = planned(dataclasses.replace(WIDE, depth=64), chips=1, prompt=32)
    assert prefill.temporary_bytes < prefill.cache_bytes / 4
    assert decode.total_bytes < decode.weight_bytes + 1.25 * decode.cache_bytes


def test_weights_cache_and_logits_are_split_over_chips(one, split):
    for whole, part in zip(one, split, strict=True):
        assert part.mesh == {"replica": 1, "fsdp": 1, "tensor": 8}
        assert part.cache_bytes == whole.cache_bytes / 8
        assert part.weight_bytes < whole.weight_bytes / 7
        assert part.whole == []
        assert part.hardware_flops == whole.hardware_flops
        # The likeliest token of each chip's part of the vocabulary, and nothing else.
        assert part.collective_bytes.get("all-gather", 0) <= 2 * 12 * 4 * 7
    # Two sums of all chips in each layer, for each of twelve tokens.
    sums = 2 * WIDE.depth * (2 * 12 * WIDE.width * 4 * 7 // 8)
    assert sums <= split[1].collective_bytes["all-reduce"] < 1.5 * sums


def test_int8_kernels_are_a_quarter_of_float32():
    found = planned(chips=1, int8=True)[1]
    small = 4 * WIDE.width * (WIDE.vocab_size + 2 * WIDE.depth + 1)  # table and norms stay
    scales = 4 * (WIDE.depth * (3 * 64 + 32 + 2 * 48 + 32) + WIDE.vocab_size)
    kernels = parameters(WIDE) - small // 4
    assert found.weight_bytes == small + scales + kernels


def test_a_batch_split_over_chips():
    found = planned(mesh=MeshConfig(fsdp=4, tensor=2))
    assert [part.whole for part in found] == [[], []]
    assert found[1].cache_bytes == planned(chips=1)[1].cache_bytes / 8


def test_what_is_whole_on_a_chip_is_named(monkeypatch):
    """A model whose logits are gathered."""
    logits = serving.architecture_of(WIDE).build.logits
    monkeypatch.setattr(
        serving.architecture_of(WIDE).build,
        "logits",
        lambda model, tokens: constrain(logits(model, tokens), "batch"),
    )
    found = planned()[1]
    assert any("12, 112" in array for array in found.whole)
    assert "WHOLE        on every chip" in "\n".join(
        plan_text.details({"remat": None, **found.to_json()}, 0, None)
    )


def test_text_of_a_plan(split):
    prefill, decode = ({"remat": None, **part.to_json()} for part in split)
    assert "tokens/s" in plan_text.row(decode)
    text = "\n".join(plan_text.details(decode, 0, 2.0))
    assert "USD for a million tokens at 2 a chip and hour" in text
    small = {**prefill, "fits": False, "available_bytes": decode["state_bytes"] - 1}
    assert "--config.int8=True" in plan_text.advice(small, 8)


def test_faults(monkeypatch):
    with pytest.raises(ConfigError, match="a prompt of at most 8 tokens"):
        serving.Serving(prompt=16, context=8)
    with pytest.raises(ConfigError, match=r"Serving\.batch_size"):
        serving.Serving(batch_size=0)
    with pytest.raises(ConfigError, match="at most 64, the model's context; found 128"):
        planned(chips=1, context=128)
    with pytest.raises(ConfigError, match="product of the mesh sizes"):
        planned(mesh=MeshConfig(fsdp=3, tensor=1))
    assert language_config("vicuna_13b").width == 5120
    with pytest.raises(ConfigError, match="vicuna_7b"):
        language_config("vicuna_8b")
    with pytest.raises(ConfigError, match="expected a language model, found ClipConfig"):
        language_config("scenes-clip")


@tpu_test
def test_published_sizes_fit_their_slices(tmp_path):
    """7B on one chip in int8 and 13B on four in bfloat16; logits and cache stay split."""
    rows = (("vicuna_7b", "v5e-1", True, 7.5), ("vicuna_13b", "v5e-4", False, 6.6))
    for name, slice_, int8, most in rows:
        file = tmp_path / f"{name}.json"
        words = [
            "--config=configs/text/serve.py",
            f"--config.model={name}",
            f"--slice={slice_}",
            f"--json={file}",
        ]
        assert common.main(plan.PROGRAM, plan.run, [*words, f"--config.int8={int8}"]) == 0
        prefill, decode = json.loads(file.read_text())
        assert decode["total_bytes"] < most * 2**30
        assert prefill["temporary_bytes"] < 0.5 * 2**30
        # No copy of a layer's weights, of the cache or of the vocabulary.
        assert decode["temporary_bytes"] < 2**24
        assert prefill["whole"] == decode["whole"] == []
        assert "all-gather" not in decode["collective_bytes"]
