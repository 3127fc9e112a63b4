"""Tokens per second of a language model, against transformers on torch, on CPU in float32.

python tests/bench/generation.py [--size=160m,1b] [--batches=1,8] [--prompt=128] [--tokens=32]
    [--rounds=5] [--compile] [--torch-threads=N] [--out=FILE.json]

Both sides have the same random weights: ours are exported as a Hugging Face folder that
transformers reads. All decode greedily without an end token. The sides take turns call by call, so
that a busy machine slows both, and the median counts. On a busy machine torch's threads wait for
each other in every operation, so that one is faster than two: try `--torch-threads=1` too. The time
to the first token is that of `generate` with one token, that of decoding what further tokens take
on top.

Each step reads all weights but the embedding table, and the cache: decoding is bound by memory. The
machine's bandwidth is measured in the same turns, by copies of a large array (bytes read and
written); "share" is the bytes that a step has to read, each second, against the faster copy's.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from decoders import SIZES
from flax import nnx

import perception_jax
from perception_jax.api import Loaded, Processor
from perception_jax.generate import Generator
from perception_jax.models.llama.config import LlamaConfig
from perception_jax.models.llama.modeling import Llama
from perception_jax.nn import stack

COPIED = 2**28
"""Bytes of the array that is copied."""

Run = Callable[[int], np.ndarray]
"""Generates so many tokens for each prompt, and returns their ids."""


def our_model(config: LlamaConfig) -> Llama:
    """With small random leaves; nothing is compiled for it."""
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if len(leaf.shape) < 3 and leaf.shape[-1] == config.width and leaf.shape[0] < 100:
            return jnp.ones(leaf.shape)  # norms
        return jax.device_put(0.02 * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree.map(fill, nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(params=0))))


def sides(config: LlamaConfig, folder: pathlib.Path, *, compiled: bool) -> Mapping[str, Any]:
    """Each side's function from prompts to a `Run`."""
    model = our_model(config)
    processor = Processor(image=None, tokenizer=None)
    perception_jax.export(Loaded(model=model, config=config, processor=processor), folder)
    found = {"ours": functools.partial(our_run, stack.separate(model))}

    def theirs() -> transformers.LlamaForCausalLM:
        return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    found["eager"] = functools.partial(their_run, theirs(), None)
    if compiled:
        model = theirs()
        model.forward = torch.compile(model.forward)
        found["compiled"] = functools.partial(their_run, model, "static")
    return found


def our_run(model: Llama, prompts: np.ndarray, tokens: int) -> Run:
    """A generator with a bucket for the prompt, and one for all tokens."""
    length = prompts.shape[1]
    generator = Generator(model, buckets=(length, length + tokens), chunk=tokens)

    def run(count: int) -> np.ndarray:
        # As much room however many tokens, so that the two programs are those of a real call.
        state = generator.prefill(list(prompts), room=tokens).state
        parts = list(generator.stream(state, tokens=count))
        return np.concatenate([np.asarray(part.ids) for part in parts], axis=1)

    return run


def their_run(model: Any, cache: str | None, prompts: np.ndarray, tokens: int) -> Run:
    """`generate` of transformers; a compiled model gets a cache of fixed size."""
    ids = torch.from_numpy(prompts.astype(np.int64))

    return functools.partial(greedy, model, ids, cache_implementation=cache)


def greedy(model: Any, ids: torch.Tensor, count: int, **more: Any) -> np.ndarray:
    """So many tokens of transformers, without an end token."""
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **more,
        )
    return out[:, ids.shape[1] :].numpy()


def copies() -> Mapping[str, Callable[[], Any]]:
    """Copies of a large array, by what makes them."""
    source = np.ones(COPIED // 4, np.float32)
    target = np.empty_like(source)
    theirs, into = torch.from_numpy(source), torch.empty(len(source))
    return {"numpy": lambda: np.copyto(target, source), "torch": lambda: into.copy_(theirs)}


def seconds(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turns after one turn to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def step_bytes(config: LlamaConfig, batch: int, length: int) -> int:
    """Bytes that a step of the loop has to read: weights but the table, and the texts' cache."""
    leaves = jax.tree.leaves(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(params=0))))
    weights = sum(math.prod(leaf.shape) for leaf in leaves) - config.vocab_size * config.width
    cache = 2 * config.depth * batch * config.kv_heads * length * config.head_width
    return 4 * (weights + cache)


def measured(size: str, found: Mapping[str, Any], batch: int, given: argparse.Namespace) -> dict:
    """The row of one size and batch."""
    config = SIZES[size]
    shape = (batch, given.prompt)
    prompts = np.random.default_rng(batch).integers(3, config.vocab_size, shape)
    runs = {name: make(prompts, given.tokens) for name, make in found.items()}
    ids = {name: run(given.tokens) for name, run in runs.items()}
    calls: dict[str, Callable[[], Any]] = {}
    for name, run in runs.items():
        calls[f"{name} first"] = functools.partial(run, 1)
        calls[f"{name} all"] = functools.partial(run, given.tokens)
    calls |= {f"copy {name}": call for name, call in copies().items()}
    times = seconds(calls, given.rounds)
    bandwidth = 2 * COPIED / min(t for name, t in times.items() if name.startswith("copy "))
    row: dict[str, Any] = {"size": size, "batch": batch, "copy_gb_per_s": bandwidth / 1e9}
    read = step_bytes(config, batch, given.prompt + given.tokens // 2)
    for name in runs:
        first = times[f"{name} first"]
        step = max(times[f"{name} all"] - first, 1e-9) / (given.tokens - 1)
        row[name] = {
            "first_token_s": first,
            "prefill_tokens_per_s": batch * given.prompt / first,
            "decode_tokens_per_s": batch / step,
            "share_of_copy": read / step / bandwidth,
            "ids_as_ours": float(np.mean(ids[name] == ids["ours"])),
        }
    return row


def shown(row: Mapping[str, Any]) -> str:
    """The row as lines: each side, and ours against it."""
    ours = row["ours"]
    lines = [f"{row['size']}, batch {row['batch']}: copy {row['copy_gb_per_s']:.1f} GB/s"]
    for name, side in row.items():
        if not isinstance(side, dict):
            continue
        prefill, decode = (
            f"{side[f'{kind}_tokens_per_s']:8.1f} "
            f"({ours[f'{kind}_tokens_per_s'] / side[f'{kind}_tokens_per_s']:.2f}×)"
            for kind in ("prefill", "decode")
        )
        lines.append(
            f"  {name:9} first token {1e3 * side['first_token_s']:8.1f} ms, prefill {prefill}, "
            f"decode {decode} tokens/s, {100 * side['share_of_copy']:.0f} % of the copy, "
            f"{100 * side['ids_as_ours']:.0f} % of the ids are ours"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures and prints; ours is so many times as fast as each side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="160m", type=lambda text: text.split(","))
    parser.add_argument("--batches", default="1,8", type=lambda text: text.split(","))
    parser.add_argument("--prompt", default=128, type=int)
    parser.add_argument("--tokens", default=32, type=int)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--torch-threads", type=int)
    parser.add_argument("--out", type=pathlib.Path)
    given = parser.parse_args()
    if given.torch_threads:
        torch.set_num_threads(given.torch_threads)
    rows = []
    for size in given.size:
        with tempfile.TemporaryDirectory() as folder:
            found = sides(SIZES[size], pathlib.Path(folder) / "hf", compiled=given.compile)
            for batch in map(int, given.batches):
                rows.append(measured(size, found, batch, given))
                print(shown(rows[-1]), flush=True)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
