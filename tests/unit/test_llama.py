"""Llama: packed documents, taps in prefill and decode, meshes, GGUF files, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import perception_jax
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.interop.export import export_params
from perception_jax.interop.gguf_file import GgufFile
from perception_jax.models.llama.config import LlamaConfig
from perception_jax.models.llama.modeling import Llama
from perception_jax.models.llama.params import gguf_table
from perception_jax.models.params import flatten
from perception_jax.testing.tiny_llama import CONFIG
from tests.arrays import drawn


@functools.cache
def model(config: LlamaConfig = CONFIG) -> Llama:
    return drawn(lambda: Llama(config, rngs=nnx.Rngs(params=0)))


def test_packed_documents_do_not_see_each_other():
    ids = np.random.default_rng(0).integers(3, 96, (1, 9))
    segments, positions = [[0] * 4 + [1] * 5], [[*range(4), *range(5)]]
    run = jax.jit(lambda model, ids, **packed: model(ids, **packed).logits)
    packed = run(model(), ids, segments=np.array(segments), positions=np.array(positions))
    for first, last in ((0, 4), (4, 9)):
        alone = run(model(), ids[:, first:last])
        np.testing.assert_allclose(packed[:, first:last], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "found 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "found 'yarn'"),
        ({"sliding_window": 4096}, "sliding window of 4096"),
        ({"layer_types": ["sliding_attention"]}, "sliding window"),
        ({"num_key_value_heads": 5}, "divide the 32 heads"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps: expected"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "original_max_position"),
    ],
)
def test_settings_that_would_give_other_numbers_are_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        LlamaConfig.from_hf(settings)


def test_defaults_and_special_tokens_of_hugging_face():
    assert LlamaConfig.from_hf({}) == LlamaConfig.vicuna_7b("1.3")
    old = {"pad_token_id": -1, "eos_token_id": None, "sliding_window": None}
    found = LlamaConfig.from_hf(old)
    assert (found.pad_id, found.end_ids) == (None, ())
    assert LlamaConfig.from_hf({"pad_token_id": 0}).pad_id == 0
    with pytest.raises(ConfigError, match=r"one of the versions 1\.1, 1\.3, 1\.5, found '2'"):
        LlamaConfig.vicuna_7b("2")


def test_what_does_not_fit_the_model_is_refused():
    ids = jnp.ones((1, 65), jnp.int32)
    with pytest.raises(ConfigError, match="at most 64 tokens, found 65"):
        model()(ids)
    with pytest.raises(ConfigError, match="language model: expected ids of 0 to 95, found 96"):
        model()(jnp.array([[1, 96]]))
    with pytest.raises(ConfigError, match="no mask beside a cache"):
        model()(ids[:, :2], mask=ids[:, :2] > 0, cache=model().empty_cache(1, 4))
    logits = jax.jit(lambda model, ids: model(ids).logits)(model(), np.array([[1, 96]]))
    assert np.isnan(logits).all()


# --- GGUF files -----------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def written(path, metadata, tensors, alignment=32) -> None:
    """A GGUF file of plain tensors, by the format's description."""
    kinds = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for name, value in metadata.items():
        header += text(name)
        if isinstance(value, list):
            header += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        elif isinstance(value, str):
            header += struct.pack("<I", 8) + text(value)
        else:
            form, kind = ("<If", 6) if isinstance(value, float) else ("<II", 4)
            header += struct.pack(form, kind, value)
    data = b""
    for name, array in tensors.items():
        header += text(name) + struct.pack("<I", array.ndim)
        header += struct.pack(f"<{array.ndim}Q", *array.shape[::-1])
        header += struct.pack("<IQ", kinds[array.dtype], len(data))
        data += array.tobytes()
        data += bytes(-len(data) % alignment)
    path.write_bytes(header + bytes(-len(header) % alignment) + data)


METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 3,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 48,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.tokens": ["<unk>", "a"],
}


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_without_quantised_tensors(tmp_path, tied):
    config = dataclasses.replace(CONFIG, tied=tied)
    made = model(config)
    tensors = {t.name: t.read() for t in export_params(gguf_table(config), flatten(made))}
    # The rows of a head in pairs, (0, d/2), (1, d/2 + 1), …, as llama.cpp turns them.
    key = np.asarray(made.blocks.attention.k_proj.kernel)[1].T
    np.testing.assert_array_equal(tensors["blk.1.attn_k.weight"][:3], key[[0, 4, 1]])
    assert ("output.weight" in tensors) != tied
    written(tmp_path / "model.gguf", METADATA, tensors)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for source in (tmp_path, tmp_path / "model.gguf"):
        loaded = perception_jax.load(source)
        assert loaded.config == config
        for path, leaf in flatten(loaded.model).items():
            np.testing.assert_array_equal(leaf, flatten(made)[path])
    assert loaded.report.read["settings"].endswith("model.gguf")
    half = {name: array.astype(np.float16) for name, array in tensors.items()}
    written(tmp_path / "model.gguf", METADATA, half)
    assert perception_jax.load(tmp_path).model.norm_final.scale.dtype == jnp.float16


def test_other_models_and_damaged_gguf_files(tmp_path):
    file = tmp_path / "model.gguf"
    tensors = {"a": np.ones((2, 3), np.float32)}
    for metadata, match in (
        (METADATA | {"general.architecture": "mamba"}, "'mamba' is not supported"),
        (METADATA | {"llama.rope.scaling.type": "yarn"}, "scaled rotary positions, found 'yarn'"),
        ({"general.architecture": "llama"}, "llama.embedding_length"),
    ):
        written(file, metadata, tensors)
        with pytest.raises(ConfigError, match=match):
            perception_jax.load(file)
    whole = file.read_bytes()
    for size in range(0, len(whole) - 8, 7):  # the last 8 bytes fill up
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"Is the download complete\?"):
            GgufFile(file)
    for place, value in ((4, 9), (8, 2**60), (16, 2**60), (24, 2**62)):
        file.write_bytes(whole[:place] + struct.pack("<Q", value) + whole[place + 8 :])
        with pytest.raises(CheckpointError, match=r"Is the download complete\?"):
            GgufFile(file)
