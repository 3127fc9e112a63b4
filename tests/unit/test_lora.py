"""LoRA and int8 kernels on linear layers: paths, values, merging, dropout, files, placement."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import perception_jax
from perception_jax.api import Loaded, load_lora, save_lora
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.interop.checkpoint_dir import open_checkpoint
from perception_jax.interop.tensors import LazyTensor, TensorSpec
from perception_jax.interop.writer import write_file
from perception_jax.models.clip.modeling import Clip
from perception_jax.models.params import flatten, unflatten
from perception_jax.models.shardings import SHARDINGS
from perception_jax.nn import int8, stack
from perception_jax.nn.adapters import AdapterParam
from perception_jax.nn.attention import Attention
from perception_jax.nn.linear import Linear
from perception_jax.nn.lora import LoraConfig, add_lora, linear_layers, merge_lora, unmerge_lora
from perception_jax.nn.mlp import GatedMlp, Mlp
from perception_jax.nn.transformer import Block
from perception_jax.shard import mesh as mesh_lib
from perception_jax.shard import rules
from perception_jax.testing import tiny_clip
from tests.arrays import normal

CONFIG = LoraConfig(rank=3, alpha=6.0)
LAYERS = (".*/attention/[qv]_proj", "vision/blocks/mlp/fc2")


@pytest.fixture(scope="module")
def clip() -> Loaded:
    model = jax.jit(lambda: Clip(tiny_clip.CONFIG, rngs=nnx.Rngs(params=0)))()
    return Loaded(model=model, config=tiny_clip.CONFIG, processor=tiny_clip.PROCESSOR, name="tiny")


@pytest.fixture(scope="module")
def pixels() -> jax.Array:
    return normal(1, 2, tiny_clip.SIZE, tiny_clip.SIZE, 3)


@jax.jit
def embed(model: Clip, pixels: jax.Array) -> jax.Array:
    return model.vision(pixels).embedding


def adapted(loaded: Loaded, config: LoraConfig = CONFIG) -> Loaded:
    """With LoRA that does something: fresh `b` are zero."""
    model = add_lora(loaded.model, config, LAYERS, rngs=nnx.Rngs(params=1))
    leaves = flatten(model)
    for path in leaves:
        if path.endswith("lora/b"):
            leaves[path] = 0.1 * normal(7, *leaves[path].shape)
    return dataclasses.replace(loaded, model=unflatten(model, leaves))


def test_fresh_lora_changes_nothing_and_only_it_trains(clip, pixels):
    before = flatten(clip.model)
    model = add_lora(clip.model, CONFIG, LAYERS, rngs=nnx.Rngs(params=1))
    after, trained = flatten(model), flatten(model, AdapterParam)
    assert flatten(clip.model).keys() == before.keys()
    assert set(after) - set(before) == set(trained)
    layers = [path for path in linear_layers(clip.model) if path.endswith(("q_proj", "v_proj"))]
    layers.append("vision/blocks/mlp/fc2")
    assert set(trained) == {f"{path}/lora/{part}" for path in layers for part in "ab"}
    assert trained["vision/blocks/mlp/fc2/lora/a"].shape == (2, 64, 3)
    np.testing.assert_array_equal(embed(model, pixels), embed(clip.model, pixels))

    graph, lora, frozen = nnx.split(model, AdapterParam, ...)
    gradient = jax.grad(lambda lora: embed(nnx.merge(graph, lora, frozen), pixels).sum())(lora)
    # `b` starts at zero, so that only it has a gradient in the first step.
    for path, leaf in nnx.to_flat_state(gradient):
        nonzero = bool(jnp.abs(leaf.get_value()).max() > 0)
        assert nonzero == (path[-1] == "b" and path[0] == "vision"), path


def test_the_term_is_the_published_one():
    layer = Linear(5, 4, rngs=nnx.Rngs(params=0))
    x = normal(2, 3, 5)
    for stabilized, scale in ((False, 8 / 2), (True, 8 / 2**0.5)):
        config = LoraConfig(rank=2, alpha=8.0, rank_stabilized=stabilized)
        with_lora = add_lora(nnx.Dict(one=layer), config, ("one",), rngs=nnx.Rngs(params=1)).one
        with_lora.lora.b[...] = normal(3, 2, 4)
        a, b = (np.asarray(leaf[...]) for leaf in (with_lora.lora.a, with_lora.lora.b))
        expected = layer(x) + scale * (x @ a @ b)
        np.testing.assert_allclose(with_lora(x), expected, atol=1e-5)
        assert np.abs(a).max() <= 5**-0.5


def test_merging_changes_no_output_and_can_be_undone(clip, pixels):
    lora = adapted(clip).model
    merged = merge_lora(lora)
    assert flatten(merged).keys() == flatten(clip.model).keys()
    assert jax.tree.structure(merged) == jax.tree.structure(clip.model)
    assert np.abs(embed(lora, pixels) - embed(clip.model, pixels)).max() > 1e-2
    np.testing.assert_allclose(embed(merged, pixels), embed(lora, pixels), atol=1e-5)
    again = unmerge_lora(merged, lora)
    for path, leaf in flatten(lora).items():
        np.testing.assert_allclose(flatten(again)[path], leaf, atol=1e-7, err_msg=path)


def test_dropout_needs_a_key_and_differs_between_layers_and_sub_layers():
    width = 8

    def block(rngs: nnx.Rngs) -> Block:
        attention = Attention(width, 2, rngs=rngs)
        return Block(width, attention, GatedMlp(width, 16, rngs=rngs), eps=1e-5)

    model = nnx.Dict(blocks=stack.init(block, 3, rngs=nnx.Rngs(params=0)))
    config = LoraConfig(rank=2, alpha=4.0, dropout=0.5)
    model = add_lora(model, config, (".*",), rngs=nnx.Rngs(params=1))
    for layer in linear_layers(model).values():
        layer.lora.b[...] = normal(7, *layer.lora.b.shape)
    x = normal(4, 2, 5, width)
    plain = stack.run(model.blocks, x).x
    np.testing.assert_array_equal(stack.run(model.blocks, x).x, plain)
    dropped = [stack.run(model.blocks, x, key=jax.random.key(k)).x for k in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert all(np.abs(one - plain).max() > 1e-3 for one in dropped)
    assert np.abs(dropped[0] - dropped[2]).max() > 1e-3

    # With the same input and matrices two layers drop other units.
    mlp = Mlp(4, 4, act="relu", bias=False, rngs=nnx.Rngs(params=0))
    mlp = add_lora(nnx.Dict(mlp=mlp), config, (".*",), rngs=nnx.Rngs(params=1)).mlp
    seen = []
    for layer in (mlp.fc1, mlp.fc2):
        layer.kernel[...] = jnp.eye(4)
        layer.lora.a[...] = jnp.eye(4)[:, :2]
        layer.lora.b[...] = jnp.eye(4)[:2]
    ones = jnp.ones((64, 4))
    seen = [mlp.fc1(ones, key=key) for key in jax.random.split(jax.random.key(0), 2)]
    both = mlp(ones, key=jax.random.key(0))
    np.testing.assert_allclose(both, mlp.fc2(seen[0], key=jax.random.split(jax.random.key(0))[1]))
    assert not np.array_equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: add_lora(m, CONFIG, (".*/q",), rngs=nnx.Rngs(0)), "matches none of text/"),
        (lambda m: add_lora(m, CONFIG, ("text/.*",), rngs=nnx.Rngs(0)), "has LoRA already"),
        (lambda m: LoraConfig(rank=0, alpha=1.0), "LoraConfig.rank: expected an integer of 1"),
        (lambda m: LoraConfig(rank=1, alpha=float("nan")), "LoraConfig.alpha"),
        (lambda m: LoraConfig(rank=1, alpha=1.0, dropout=1.0), "LoraConfig.dropout"),
        (lambda m: merge_lora(merge_lora(m)), "expected a model with LoRA"),
        (lambda m: merge_lora(int8.quantize_linear(m)), "merge before the model is quantized"),
        (lambda m: unmerge_lora(m.text, m), "expected a merged model"),
    ],
)
def test_lora_that_makes_no_sense_is_refused(clip, make, message):
    with pytest.raises(ConfigError, match=message):
        make(adapted(clip).model)


def test_a_peft_folder_comes_back(clip, pixels, tmp_path):
    lora = adapted(clip)
    save_lora(lora, tmp_path / "lora", base="openai/clip")
    again = load_lora(clip, tmp_path / "lora")
    for path, leaf in flatten(lora.model).items():
        np.testing.assert_array_equal(flatten(again.model)[path], leaf, err_msg=path)
    np.testing.assert_array_equal(embed(again.model, pixels), embed(lora.model, pixels))
    settings = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (3, 6, "LORA")
    # The text tower's `fc2` has none, so that the last part of the name would not do for it.
    assert "vision_model.encoder.layers.1.mlp.fc2" in settings["target_modules"]
    with pytest.raises(ConfigError, match=r"found it on 5 layers, e\.g\. text/blocks"):
        perception_jax.export(lora, tmp_path / "hf")
    quantized = dataclasses.replace(clip, model=int8.quantize_linear(clip.model))
    with pytest.raises(ConfigError, match="expected floating weights, found int8"):
        perception_jax.export(quantized, tmp_path / "hf")
    with pytest.raises(ConfigError, match="found none on any linear layer"):
        save_lora(clip, tmp_path / "none")


def test_lora_of_another_model_is_refused(clip, tmp_path, caplog):
    save_lora(adapted(clip), tmp_path, base="openai/clip", overwrite=True)
    leaves = flatten(clip.model)
    leaves["vision/norm_post/scale"] = 2 * leaves["vision/norm_post/scale"]
    other = dataclasses.replace(clip, model=unflatten(clip.model, leaves), name="other")
    with pytest.raises(CheckpointError, match="found other with fingerprint"):
        load_lora(other, tmp_path)
    # Without a fingerprint, as PEFT writes it, only the names can be compared.
    tensors = dict(open_checkpoint(tmp_path / "adapter_model.safetensors"))
    torch_like = {name: np.array(value) for name, value in tensors.items()}
    rewrite(tmp_path / "adapter_model.safetensors", torch_like)
    load_lora(other, tmp_path)
    assert "was trained on openai/clip and is put on other" in caplog.text
    moved = {name.replace("vision_model", "tower"): value for name, value in torch_like.items()}
    rewrite(tmp_path / "adapter_model.safetensors", moved)
    with pytest.raises(CheckpointError, match=r"found 12 of 16 others.*LoRA of another model\?"):
        load_lora(clip, tmp_path)
    torch_like.pop("base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight")
    rewrite(tmp_path / "adapter_model.safetensors", torch_like)
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_B\.weight"):
        load_lora(clip, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"or adapter_model\.bin in"):
        load_lora(clip, tmp_path)


def rewrite(path, tensors):
    """Writes the tensors of a file without our own metadata, as PEFT would."""
    path.unlink()
    write_file(
        path,
        [
            LazyTensor(name, TensorSpec(value.shape, value.dtype), lambda value=value: value)
            for name, value in tensors.items()
        ],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "expected the peft_type LORA"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported; expected 'none'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 0}, "r: expected an integer of 1"),
        ({"r": "8"}, "r: expected an integer"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"r": 4}, "shape"),
    ],
)
def test_settings_of_a_peft_folder_are_checked(clip, tmp_path, change, message):
    save_lora(adapted(clip), tmp_path, overwrite=True)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load_lora(clip, tmp_path)


def test_lora_lies_on_the_mesh_of_its_model(clip, pixels, tmp_path):
    lora = adapted(clip)
    save_lora(lora, tmp_path / "lora")
    mesh = mesh_lib.make_mesh(1, 2, 2, devices=jax.devices()[:4])
    leaves = flatten(clip.model)
    placed = jax.device_put(leaves, rules.shardings(leaves, SHARDINGS, mesh))
    on_mesh = dataclasses.replace(clip, model=unflatten(clip.model, placed))
    found = load_lora(on_mesh, tmp_path / "lora").model
    specs = {path: leaf.sharding.spec for path, leaf in flatten(found, AdapterParam).items()}
    assert specs["vision/blocks/attention/q_proj/lora/a"][:2] == (None, "fsdp")
    assert specs["vision/blocks/attention/q_proj/lora/b"][2] == ("tensor", "fsdp")  # rank 3 is odd
    assert specs["vision/blocks/mlp/fc2/lora/a"][1] == ("tensor", "fsdp")
    assert specs["vision/blocks/mlp/fc2/lora/b"][2] == "fsdp"
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(embed(found, pixels), embed(lora.model, pixels), atol=1e-5)


def test_int8_kernels_are_half_a_scale_from_the_weights(clip, pixels):
    kernel = np.array(normal(5, 2, 16, 5))
    kernel[0, :, 3] = 0
    values, scale = int8.quantize(jnp.asarray(kernel))
    assert (values.dtype, scale.shape) == (jnp.int8, (2, 5))
    back = np.asarray(values, np.float32) * np.asarray(scale)[:, None]
    assert np.all(np.abs(back - kernel) <= 0.5001 * np.asarray(scale)[:, None])
    assert np.abs(np.asarray(values)).max() == 127

    model = int8.quantize_linear(clip.model, "vision/blocks/.*")
    before, after = flatten(clip.model), flatten(model)
    added = set(after) - set(before)
    assert len(added) == 6
    assert all(path.endswith("/scale") for path in added)
    assert (
        after["vision/blocks/mlp/fc1/kernel"].nbytes * 4
        == before["vision/blocks/mlp/fc1/kernel"].nbytes
    )
    exact, found = embed(clip.model, pixels), embed(model, pixels)
    cosine = (
        np.sum(exact * found, -1) / np.linalg.norm(exact, axis=-1) / np.linalg.norm(found, axis=-1)
    )
    assert np.all(cosine > 0.999)
    assert not np.array_equal(exact, found)
    # The same as the rounded weights in float32.
    rounded = dict(before)
    for path in added:
        name = path.removesuffix("scale") + "kernel"
        rounded[name] = after[name].astype(jnp.float32) * after[path][..., None, :]
    np.testing.assert_allclose(found, embed(unflatten(clip.model, rounded), pixels), atol=1e-5)
    with pytest.raises(ConfigError, match="is quantized already"):
        int8.quantize_linear(model)
    with pytest.raises(ConfigError, match="found none like 'nothing'"):
        int8.quantize_linear(model, "nothing")
