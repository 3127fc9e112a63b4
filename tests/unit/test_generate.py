"""Generation: caches, chunks, padding, batches, sampling states, stopping, on a tiny Llama."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perception_jax.errors import ConfigError
from perception_jax.generate import Generator, Sampling, StopStrings, decode, extend, prefill
from perception_jax.generate import generator as programs
from perception_jax.models.llama.modeling import Llama
from perception_jax.models.params import flatten, unflatten
from perception_jax.nn import stack
from perception_jax.testing.tiny_llama import CONFIG
from tests.arrays import drawn

LENGTHS = (3, 9, 5, 1, 12, 7, 2, 8)
PROMPTS = [
    np.random.default_rng(seed).integers(3, CONFIG.vocab_size, length)
    for seed, length in enumerate(LENGTHS)
]
NEW = 10


@functools.cache
def model() -> Llama:
    """Blocks with large weights, so that texts neither repeat a token nor copy the prompt."""
    made = drawn(lambda: Llama(CONFIG, rngs=nnx.Rngs(params=0)))
    params = flatten(made)
    kernels = (path for path in params if path.startswith("blocks/") and path.endswith("kernel"))
    return unflatten(made, params | {path: 4 * params[path] for path in kernels})


@functools.cache
def generator() -> Generator:
    return Generator(model(), buckets=(16, 32), chunk=4)


@jax.jit
def logits_of(model, ids):
    return model(ids).logits


def whole(ids) -> np.ndarray:
    """Logits after the last token, without a cache, in one shape for all texts."""
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(logits_of(model(), padded))[0, len(ids) - 1]


@functools.cache
def greedy(row: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """New tokens and their log-probabilities, without a cache."""
    ids, log_probs = PROMPTS[row].tolist(), []
    for _ in range(NEW):
        logits = whole(ids)
        ids.append(int(logits.argmax()))
        log_probs.append(float(logits.max() - np.logaddexp.reduce(logits.astype(np.float64))))
    return tuple(ids[-NEW:]), tuple(log_probs)


@pytest.mark.parametrize("rows", [(0,), (4, 2, 0), range(8)], ids=["1", "3", "8"])
def test_a_batch_of_unequal_prompts_gives_what_each_gives_without_a_cache(rows):
    found = generator().generate([PROMPTS[row] for row in rows], tokens=NEW)
    for row, one in zip(rows, found, strict=True):
        ids, log_probs = greedy(row)
        assert one.ids == ids
        np.testing.assert_allclose(one.log_probs, log_probs, atol=2e-5)
        assert (one.ended, one.text) == ("length", None)


@pytest.mark.parametrize("chunks", [(12,), (5, 7), (1, 2, 4, 5), (1,) * 12])
def test_extended_in_any_chunks_is_the_same_as_at_once(chunks):
    ids = np.stack([PROMPTS[4], PROMPTS[4][::-1]])
    state = generator().prefill(list(ids[:, : chunks[0]])).state
    done = chunks[0]
    for count in chunks[1:]:
        state = generator().extend(state, list(ids[:, done : done + count])).state
        done += count
    assert state.cache.lengths.tolist() == [12, 12]
    expected = np.stack([whole(row) for row in ids])
    np.testing.assert_allclose(state.logits, expected, atol=2e-5)
    seen = [sorted(np.flatnonzero(row)) for row in np.asarray(state.seen)]
    assert seen == [sorted(set(row)) for row in ids]


def test_padding_on_either_side_or_inside_changes_nothing():
    row = PROMPTS[1]
    ids = np.full((3, 16), 77, np.int32)
    mask = np.zeros((3, 16), bool)
    mask[0, :9], mask[1, -9:], mask[2, [0, 1, 4, 6, 7, 8, 11, 12, 15]] = True, True, True
    ids[mask] = np.tile(row, 3)
    run = jax.jit(functools.partial(prefill, capacity=16))
    state = run(model(), ids, mask).state
    np.testing.assert_allclose(state.logits, np.tile(whole(row), (3, 1)), atol=2e-5)
    for leaf in (state.cache.keys, state.cache.values):
        leaf = np.asarray(leaf)[:, :, :, :9]
        np.testing.assert_allclose(leaf, leaf[:, :1].repeat(3, axis=1), atol=1e-5)
    # Embeddings in place of ids; a text without new tokens stays as it is.
    given = run(model(), model().embed(ids), mask).state
    np.testing.assert_allclose(given.logits, state.logits, atol=1e-6)
    again = jax.jit(extend)(model(), state, ids[:, :2], np.zeros((3, 2), bool)).state
    np.testing.assert_array_equal(again.logits, state.logits)
    assert again.cache.lengths.tolist() == [9, 9, 9]


def test_a_prefix_is_shared_and_a_text_goes_on_after_its_end():
    """Two questions after one prefix, each answered, and a second turn of one of them."""
    prefix, turns = PROMPTS[1].tolist(), ([5, 6, 7], [8])
    state = generator().prefill([prefix]).state.take(jnp.array([0, 0]))
    state = generator().extend(state, turns, room=4).state
    *_, last = generator().stream(state, tokens=4)
    texts = [prefix + turn + list(answer) for turn, answer in zip(turns, last.ids, strict=True)]
    for text in texts:
        expected = list(text[:-4])
        for _ in range(4):
            expected.append(int(whole(expected).argmax()))
        assert text == expected
    second = generator().extend(last.state, [[9, 10], []]).state
    np.testing.assert_allclose(second.logits[0], whole([*texts[0], 9, 10]), atol=2e-5)
    np.testing.assert_allclose(second.logits[1], whole(texts[1]), atol=2e-5)


def test_each_shape_is_compiled_once(monkeypatch):
    traced = []
    call = Llama.__call__

    def counted(self, inputs, **options):
        traced.append(inputs.shape[:2])
        return call(self, inputs, **options)

    monkeypatch.setattr(Llama, "__call__", counted)
    for program in (programs._prefill, programs._extend, programs._decode):
        program.clear_cache()
    own = Generator(model(), buckets=(16, 32), chunk=4)
    for row, tokens in ((0, 1), (1, 7), (4, 2), (1, 4), (2, 3)):
        own.generate([PROMPTS[row]], tokens=tokens)
    assert traced == [(1, 16), (1, 1)]
    own.generate([np.tile(PROMPTS[4], 2)], tokens=4)
    assert traced == [(1, 16), (1, 1), (1, 32), (1, 1)]


def test_the_end_token_the_limit_and_the_end_of_the_cache():
    ids, _ = greedy(0)
    end = Sampling(end_ids=(ids[4], 95), pad_id=1)
    first = ids.index(ids[4]) + 1
    one, other = generator().generate([PROMPTS[0], PROMPTS[1]], tokens=NEW, sampling=end)
    assert (one.ids, one.ended) == (ids[:first], "end")
    assert other.ids == greedy(1)[0][: len(other.ids)]
    (full,) = Generator(model(), buckets=(16,), chunk=4).generate([PROMPTS[1]], tokens=NEW)
    assert (full.ids, full.ended) == (greedy(1)[0][:7], "length")


def letters(ids) -> str:
    return "".join(chr(0x100 + i) for i in ids)


def test_stop_strings_end_a_text_and_are_no_part_of_it():
    ids, _ = greedy(0)
    stop = StopStrings(strings=(letters(ids[3:6]), "never"), decode=letters)
    one, other = generator().generate([PROMPTS[0], PROMPTS[1]], tokens=NEW, stop=stop)
    assert (one.ids, one.text, one.ended) == (ids[:6], letters(ids[:3]), "stop")
    assert len(one.log_probs) == 6
    assert (other.ids, other.text) == (greedy(1)[0], letters(greedy(1)[0]))
    state = generator().prefill([PROMPTS[0]]).state
    *_, last = generator().stream(state, tokens=NEW, stop=stop)
    assert last.state.cache.lengths.tolist() == [3 + 6]
    after = generator().extend(last.state, [[9]]).state
    np.testing.assert_allclose(after.logits[0], whole([*PROMPTS[0], *ids[:6], 9]), atol=2e-5)


SAMPLED = Sampling(temperature=0.9, top_k=40, top_p=0.9, repetition_penalty=1.2)


def test_what_is_drawn_depends_on_seed_and_text_alone():
    """Not on batch mates, nor on the parts of the loop."""
    prompts = [PROMPTS[row] for row in (0, 1, 2)]
    found = generator().generate(prompts, tokens=NEW, sampling=SAMPLED, seed=3)
    assert found != generator().generate(prompts, tokens=NEW, sampling=SAMPLED, seed=4)
    (alone,) = generator().generate(prompts[:1], tokens=NEW, sampling=SAMPLED, seed=3)
    assert alone.ids == found[0].ids
    (last,) = generator().generate(prompts[2:], tokens=NEW, sampling=SAMPLED, seed=3, first=2)
    assert last.ids == found[2].ids
    other = Generator(model(), buckets=(32,), chunk=NEW)
    assert [one.ids for one in other.generate(prompts, tokens=NEW, sampling=SAMPLED, seed=3)] == [
        one.ids for one in found
    ]
    texts = [[*prompt, *one.ids] for prompt, one in zip(prompts, found, strict=True)]
    for text, one in zip(texts, found, strict=True):
        for n, log_prob in enumerate(one.log_probs):
            logits = whole(text[: len(text) - NEW + n]).astype(np.float64)
            expected = logits[one.ids[n]] - np.logaddexp.reduce(logits)
            np.testing.assert_allclose(log_prob, expected, atol=5e-5)


def test_what_does_not_fit_is_refused():
    small = Generator(model(), buckets=(8,))
    for call, match in (
        (lambda: small.prefill([[3] * 9]), "at most 8 tokens, the largest bucket; found one of 9"),
        (
            lambda: Generator(model()).prefill([[3] * 65]),
            "at most 64 tokens, the model's context; found one of 65",
        ),
        (lambda: small.prefill([]), "at least one, found none"),
        (lambda: small.prefill([[3], []]), "found an empty one"),
        (lambda: small.prefill([[3, 96]]), "ids of 0 to 95, found 96"),
        (lambda: Generator(model(), buckets=(8, 128)), "at most 64 tokens"),
        (lambda: prefill(model(), np.ones((1, 8), np.int32), capacity=4), "at least 8 tokens"),
        (lambda: generator().generate([[3]], tokens=2, sampling=SAMPLED), "random key"),
        (lambda: StopStrings(strings=("",), decode=letters), "not empty"),
        (lambda: Sampling(top_p=0.0), "Sampling.top_p: expected"),
    ):
        with pytest.raises(ConfigError, match=match):
            call()
    state = generator().prefill([PROMPTS[4], PROMPTS[0]]).state
    with pytest.raises(ConfigError, match="at most 32 tokens"):
        generator().extend(state, [[3] * 21, [3]])
    with pytest.raises(ConfigError, match="tokens for 2 texts, found 1"):
        generator().extend(state, [[3]])


def test_the_loop_copies_neither_layers_nor_the_cache():
    """With separate layers no weights are moved; a scan over a stack copies each layer out of it.
    The cache is updated in place in both."""
    config = dataclasses.replace(CONFIG, context=1024, width=64, mlp_dim=1024)
    stacked = drawn(lambda: Llama(config, rngs=nnx.Rngs(params=0)))
    start = jax.jit(functools.partial(prefill, capacity=config.context))
    state = start(stacked, np.ones((1, 4), np.int32)).state
    leaves, structure = jax.tree.flatten(state)

    def loop(model, leaves):
        return jax.tree.leaves(decode(model, structure.unflatten(leaves), steps=8))

    copied = []
    for model in (stacked, stack.separate(stacked)):
        compiled = jax.jit(loop, donate_argnums=1).lower(model, leaves).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= state.cache.keys.nbytes + state.cache.values.nbytes
        copied.append(memory.temp_size_in_bytes)
    kernel = 4 * config.width * config.mlp_dim
    assert copied[1] < state.cache.keys.nbytes < kernel < copied[0]
