"""How tokens are chosen, against the logits processors of `transformers` on fixed logits, and a
greedy text of its `generate` from left-padded prompts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perception_jax
from perception_jax.errors import ConfigError
from perception_jax.generate import Generator, Sampling, reshaped
from tests.parity.measures import Row
from tests.parity.test_llama_transformers import theirs_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SETTINGS = {
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.6},
    "penalty": {"repetition_penalty": 1.3},
    "all": {"temperature": 1.4, "top_k": 30, "top_p": 0.85, "repetition_penalty": 0.8},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_reshaped_as_transformers_does(name):
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(4, 97))).astype(np.float32)
    logits[1, :10] = logits[1, 20]  # ties
    ids = rng.integers(0, 97, (4, 12))
    settings = {"do_sample": True, "top_k": 0, **SETTINGS[name]}
    config = transformers.GenerationConfig(**settings)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    processors = model._get_logits_processor(
        config, input_ids_seq_length=12, logits_processor=transformers.LogitsProcessorList()
    )
    expected = processors(torch.tensor(ids), torch.tensor(logits)).numpy()
    seen = np.zeros((4, 97), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    sampling = Sampling.from_hf(config.to_dict())
    found = jax.jit(reshaped, static_argnums=2)(jnp.asarray(logits), jnp.asarray(seen), sampling)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_settings_of_a_folder(tmp_path):
    assert Sampling.from_folder(tmp_path) == Sampling()
    config = transformers.GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[2, 7], pad_token_id=0
    )
    config.save_pretrained(tmp_path)
    assert Sampling.from_folder(tmp_path) == Sampling(
        temperature=0.6, top_k=50, top_p=0.9, end_ids=(2, 7)
    )
    config.do_sample = False
    assert Sampling.from_hf(config.to_dict()) == Sampling(end_ids=(2, 7))
    for settings, match in (
        ({"num_beams": 4}, "num_beams 4 is not supported"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size 3"),
        ({"bad_words_ids": [[3]]}, r"bad_words_ids \[\[3\]\]"),
        ({"temperature": "hot", "do_sample": True}, "temperature: expected"),
    ):
        with pytest.raises(ConfigError, match=match):
            Sampling.from_hf(settings)


@pytest.mark.parametrize("kind", ["MHA", "GQA, tied"])
def test_greedy_texts_of_unequal_prompts(tmp_path, kind):
    theirs = theirs_of(kind, scale=0.4)
    theirs.save_pretrained(tmp_path)
    loaded = perception_jax.load(tmp_path)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 97, length) for length in (2, 9, 5)]
    ids, mask = np.zeros((3, 9), np.int64), np.zeros((3, 9), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, 9 - len(prompt) :], mask[row, 9 - len(prompt) :] = prompt, 1
    expected = theirs.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.1,
        eos_token_id=[96, 2],
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    found = Generator(loaded.model, buckets=(16, 32)).generate(
        prompts, tokens=12, sampling=Sampling(repetition_penalty=1.1, end_ids=(96, 2))
    )
    row = Row(f"tiny Llama, {kind}, greedy", "Hugging Face", "transformers' generate")
    row.read(loaded.report)
    logits = torch.stack(expected.logits, dim=1).numpy().astype(np.float64)
    log_probs = logits - np.logaddexp.reduce(logits, axis=2, keepdims=True)
    for i, one in enumerate(found):
        new = expected.sequences[i, 9:].tolist()
        assert list(one.ids) == new[: len(one.ids)]
        assert set(new[len(one.ids) :]) <= {0}
        row.close(one.log_probs, [log_probs[i, n, id] for n, id in enumerate(one.ids)], 1e-4)
