"""Llama both ways against `transformers` with random tiny weights."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perception_jax
from perception_jax.nn.taps import Taps
from tests.parity.measures import Row
from tests.parity.torch_code import assert_bit_equal, randomised

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KINDS = {
    "MHA": {"num_key_value_heads": 4},
    "GQA, tied": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": LLAMA3,
        "eos_token_id": [2, 5],
    },
    "one key head, biases": {
        "num_key_value_heads": 1,
        "head_dim": 12,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1000.0},
    },
}


def theirs_of(kind, scale=0.05):
    config = transformers.LlamaConfig(**SIZES, **KINDS[kind], attn_implementation="eager")
    return randomised(transformers.LlamaForCausalLM(config), scale)


def inputs(padding):
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 97, (2, 11))
    mask = np.ones((2, 11), bool)
    if padding == "left":
        mask[1, :4] = False
    if padding == "right":
        mask[1, 7:] = False
    return ids, mask


def outputs_of(theirs, ids, mask):
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    with torch.no_grad():
        return theirs(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            position_ids=torch.tensor(positions),
            output_hidden_states=True,
            output_attentions=True,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways(tmp_path, kind):
    theirs = theirs_of(kind)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    loaded = perception_jax.load(tmp_path / "theirs")
    row = Row(f"tiny Llama, {kind}", "Hugging Face", "transformers")
    row.read(loaded.report)
    taps = Taps(attention=(0, 2), hidden=(0, 1, 2))
    run = jax.jit(lambda model, ids, mask: model(ids, mask=mask, taps=taps))
    for padding in ("none", "left", "right"):
        ids, mask = inputs(padding)
        expected = outputs_of(theirs, ids, mask)
        out = run(loaded.model, jnp.asarray(ids), jnp.asarray(mask))
        row.close(np.asarray(out.logits)[mask], expected.logits.numpy()[mask], 1e-4)
        for ours, state in zip(out.hidden, expected.hidden_states, strict=False):
            row.close(np.asarray(ours)[mask], state.numpy()[mask])
        for ours, layer in zip(out.attention, (0, 2), strict=True):
            rows = np.asarray(ours).swapaxes(1, 2)[mask]
            row.close(rows, expected.attentions[layer].numpy().swapaxes(1, 2)[mask])
    perception_jax.export(loaded, tmp_path / "ours")
    again = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    assert_bit_equal(theirs, again)
    ids, mask = inputs("left")
    before, after = (outputs_of(model, ids, mask).logits for model in (theirs, again))
    np.testing.assert_array_equal(before, after)
    ours, given = again.config, theirs.config
    assert ours.eos_token_id == given.eos_token_id
    assert ours.rope_parameters.items() >= given.rope_parameters.items()
    perception_jax.export(loaded, tmp_path / "jax", layout="jax")
    assert perception_jax.load(tmp_path / "jax").config == loaded.config
    row.both_ways = True


@pytest.mark.parametrize("kind", ["MHA", "GQA, tied"])
def test_torch_shards_with_buffers_of_older_transformers(tmp_path, kind):
    """`.bin` shards, `inv_freq` in every layer, a tied head stored beside the embedding."""
    theirs = theirs_of(kind)
    state = dict(theirs.state_dict())
    settings = theirs.config.to_dict() | {"rope_theta": 10000.0, "rope_scaling": None}
    if kind != "MHA":
        rope = settings.pop("rope_parameters")
        settings |= {"rope_scaling": rope, "rope_theta": rope.pop("rope_theta")}
        assert "lm_head.weight" in state
    for layer in range(3):
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    shards = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
    for shard in set(shards.values()):
        part = {name: tensor for name, tensor in state.items() if shards[name] == shard}
        torch.save(part, tmp_path / shard)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded = perception_jax.load(tmp_path)
    assert len(loaded.report.ignored) == 3
    ids, mask = inputs("right")
    expected = outputs_of(theirs, ids, mask).logits.numpy()
    logits = jax.jit(lambda model: model(ids, mask=mask).logits)(loaded.model)
    np.testing.assert_allclose(np.asarray(logits)[mask], expected[mask], atol=1e-4)
