"""Shared layers against torch and `transformers` with random weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perception_jax.nn import stack
from perception_jax.nn.attention import Attention, AttentionMask
from perception_jax.nn.mlp import GatedMlp, Mlp
from perception_jax.nn.norms import ChannelNorm, GroupNorm, RmsNorm
from perception_jax.nn.rope import Rope, rotary, rotary_axes, rotary_sections
from perception_jax.nn.transformer import Block
from tests.parity.torch_code import randomised

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

B, T, D, DEPTH = 2, 6, 16, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(B, T, D)).astype(np.float32)


def assert_close(ours, theirs, tolerance=1e-5):
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=tolerance)


def ours(module):
    """A torch linear layer or norm under our names."""
    weight = module.weight.detach().numpy()
    name = "kernel" if weight.ndim == 2 else "scale"
    found = {name: weight.T if weight.ndim == 2 else weight}
    if getattr(module, "bias", None) is not None:
        found["bias"] = module.bias.detach().numpy()
    return found


def filled(make, layers):
    """A stack of `make` with the weights of torch layers, given as {path: module}."""
    abstract = nnx.eval_shape(lambda: stack.init(make, len(layers), rngs=nnx.Rngs(params=0)))
    graph, state = nnx.split(abstract)
    flat = dict(nnx.to_flat_state(state))
    for path in flat:
        name = ".".join(path[:-1])
        leaf = np.stack([ours(layer[name])[path[-1]] for layer in layers])
        assert flat[path].shape == leaf.shape, path
        flat[path] = flat[path].replace(jnp.asarray(leaf))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def test_a_post_norm_stack_equals_bert_with_random_weights():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=D,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        intermediate_size=24,
        vocab_size=9,
        attn_implementation="eager",
    )
    model = randomised(BertModel(config, add_pooling_layer=False)).eval()

    def make(rngs):
        attention = Attention(D, 4, rngs=rngs)
        mlp = Mlp(D, 24, act="gelu", rngs=rngs)
        return Block(D, attention, mlp, eps=config.layer_norm_eps, norm="post", dropout=0.1)

    def of_layer(layer):
        return {
            "attention.q_proj": layer.attention.self.query,
            "attention.k_proj": layer.attention.self.key,
            "attention.v_proj": layer.attention.self.value,
            "attention.out_proj": layer.attention.output.dense,
            "norm1": layer.attention.output.LayerNorm,
            "mlp.fc1": layer.intermediate.dense,
            "mlp.fc2": layer.output.dense,
            "norm2": layer.output.LayerNorm,
        }

    lengths = np.array([6, 4])
    with torch.no_grad():
        mask = torch.tensor(np.arange(T) < lengths[:, None]).long()
        ids = torch.tensor(RNG.integers(0, 9, (B, T)))
        out = model(ids, attention_mask=mask, output_hidden_states=True)
    blocks = filled(make, [of_layer(layer) for layer in model.encoder.layer])
    start, *expected = (state.numpy() for state in out.hidden_states)
    mask = AttentionMask(lengths=jnp.asarray(lengths))
    found = jax.jit(lambda blocks, x: stack.run(blocks, x, mask=mask).x)(blocks, start)
    assert_close(found, expected[-1])


def test_a_decoder_stack_equals_llama_with_random_weights():
    """RMS norms, grouped queries, half-split rotary positions of each example, a gated MLP."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=D,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=24,
        vocab_size=9,
        attn_implementation="eager",
    )
    model = randomised(LlamaModel(config)).eval()

    def make(rngs):
        attention = Attention(D, 4, kv_heads=2, head_width=8, bias=False, rngs=rngs)
        mlp = GatedMlp(D, 24, bias=False, rngs=rngs)
        return Block(D, attention, mlp, eps=config.rms_norm_eps, norm_type=RmsNorm)

    def of_layer(layer):
        attention, mlp = layer.self_attn, layer.mlp
        return {
            "norm1": layer.input_layernorm,
            "attention.q_proj": attention.q_proj,
            "attention.k_proj": attention.k_proj,
            "attention.v_proj": attention.v_proj,
            "attention.out_proj": attention.o_proj,
            "norm2": layer.post_attention_layernorm,
            "mlp.gate": mlp.gate_proj,
            "mlp.up": mlp.up_proj,
            "mlp.down": mlp.down_proj,
        }

    positions = np.array([np.arange(T), np.arange(T) + 70])
    with torch.no_grad():
        out = model(inputs_embeds=torch.tensor(X), position_ids=torch.tensor(positions))
    blocks = filled(make, [of_layer(layer) for layer in model.layers])
    norm = RmsNorm(D, eps=config.rms_norm_eps)
    norm.scale[...] = jnp.asarray(model.norm.weight.detach().numpy())
    rope = rotary(jnp.asarray(positions), 8, theta=10000.0)

    @jax.jit
    def run(blocks, x):
        return norm(stack.run(blocks, x, mask=AttentionMask(causal=True), rope=rope).x)

    assert_close(run(blocks, X), out.last_hidden_state)


def test_rotary_positions_equal_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    q, k = (RNG.normal(size=(B, T, 2, 16)).astype(np.float32) for _ in range(2))

    def turned(rope: Rope):
        return [rope.rotate(jnp.asarray(x)).swapaxes(1, 2) for x in (q, k)]

    heads_first = [torch.tensor(x).transpose(1, 2) for x in (q, k)]
    # Llama: one axis.
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, rope_theta=10000.0)
    positions = np.array([np.arange(T), 3000 + 7 * np.arange(T)])
    cos, sin = llama.LlamaRotaryEmbedding(config)(heads_first[0], torch.tensor(positions))
    expected = llama.apply_rotary_pos_emb(*heads_first, cos, sin)
    for ours, theirs in zip(turned(rotary(jnp.asarray(positions), 16)), expected, strict=True):
        assert_close(ours, theirs)
    # Qwen2.5-VL's decoder: three axes share one ladder in sections.
    positions = RNG.integers(0, 900, (B, T, 3))
    sections = (2, 3, 3)
    bands = 1.0 / (10000.0 ** (torch.arange(0, 16, 2).float() / 16))
    angles = torch.tensor(positions).float().permute(2, 0, 1)[..., None] * bands
    angles = torch.cat([angles, angles], dim=-1)
    parts = torch.cat(
        [part[axis % 3] for axis, part in enumerate(angles.split(list(sections) * 2, dim=-1))],
        dim=-1,
    )
    expected = llama.apply_rotary_pos_emb(*heads_first, parts.cos(), parts.sin())
    found = turned(rotary_sections(jnp.asarray(positions), sections))
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)
    # Its image tower: rows and columns have a ladder each.
    grid = RNG.integers(0, 30, (T, 2))
    ladder = 1.0 / (10000.0 ** (torch.arange(0, 8, 2).float() / 8))
    table = torch.outer(torch.arange(30).float(), ladder)
    angles = table[torch.tensor(grid)].flatten(1)
    angles = torch.cat([angles, angles], dim=-1)
    flat = [torch.tensor(x[0]) for x in (q, k)]
    expected = qwen.apply_rotary_pos_emb_vision(*flat, angles.cos(), angles.sin())
    found = turned(rotary_axes(jnp.asarray(grid), 16))
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours[0].swapaxes(0, 1), theirs)


def test_interleaved_rotary_positions_and_heads_that_turn_in_part():
    """Complex numbers: a pair (a, b) is a + bi times e^(i angle); the rest is left alone."""
    positions = jnp.arange(T)
    x = RNG.normal(size=(B, T, 2, 12)).astype(np.float32)
    rope = rotary(positions, 8, interleaved=True)
    found = np.asarray(rope.rotate(jnp.asarray(x)))
    angles = np.arange(T)[:, None] * 10000.0 ** (-np.arange(4) / 4)
    pairs = (x[..., 0:8:2] + 1j * x[..., 1:8:2]) * np.exp(1j * angles)[None, :, None]
    assert_close(found[..., 0:8:2], pairs.real)
    assert_close(found[..., 1:8:2], pairs.imag)
    assert_close(found[..., 8:], x[..., 8:], 0)
    halves = dataclasses.replace(rotary(positions, 8), interleaved=False)
    split = np.concatenate([x[..., 0:8:2], x[..., 1:8:2]], axis=-1)
    assert_close(halves.rotate(jnp.asarray(split))[..., :4], pairs.real)


def test_norms_equal_torch():
    image = (3 + 2 * RNG.normal(size=(B, 4, 5, 12))).astype(np.float32)
    theirs = randomised(torch.nn.GroupNorm(3, 12, eps=1e-5))
    norm = GroupNorm(12, 3, eps=1e-5)
    expected = theirs(torch.tensor(image).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    weights = ours(theirs)
    norm.scale[...], norm.bias[...] = weights["scale"], weights["bias"]
    assert_close(norm(jnp.asarray(image)), expected)
    theirs = randomised(torch.nn.RMSNorm(12, eps=1e-6))
    norm = RmsNorm(12, eps=1e-6)
    norm.scale[...] = ours(theirs)["scale"]
    assert_close(norm(jnp.asarray(image)), theirs(torch.tensor(image)))
    nchw = torch.tensor(image).permute(0, 3, 1, 2)
    centred = nchw - nchw.mean(1, keepdim=True)
    expected = centred / torch.sqrt((centred**2).mean(1, keepdim=True) + 1e-6)
    assert_close(ChannelNorm(12, eps=1e-6)(jnp.asarray(image)), expected.permute(0, 2, 3, 1))
