"""Seconds and host memory to load a checkpoint, against transformers.

python tests/bench/loading.py [--model=clip_l14] [--rounds=5] [--shards=4] [--dtype=float32]
    [--out=FILE.json]

Writes random weights as a Hugging Face folder in several shards (CLIP ViT-L/14's 1.7 GB in float32,
or with --model=llama_1b --dtype=bfloat16 TinyLlama's 2.2 GB), then loads it
in new processes that take turns. What counts is the call that loads, until one number of every page
of every weight has been read; imports are measured separately. The files stay in the page cache.
Memory is the peak of the process above what it held before the call, as a multiple of the weights'
size.

transformers 5 maps the files and copies nothing, so its weights are the page cache; "transformers,
own" also copies each weight into the process's memory, where ours are.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

CHILD = pathlib.Path(__file__)
PAGE = 4096
"""Bytes."""
OURS, THEIRS, OWN = "ours", "transformers", "transformers, own"


def _models() -> dict[str, tuple[Any, Callable[[Any], Any]]]:
    """Settings and class of each model by name."""
    import decoders

    from perception_jax.models.clip.config import ClipConfig
    from perception_jax.models.clip.modeling import Clip
    from perception_jax.models.llama.modeling import Llama

    return {"clip_l14": (ClipConfig.vit_l14(), Clip), "llama_1b": (decoders.SIZES["1b"], Llama)}


def write(folder: pathlib.Path, model: str, shards: int, dtype: str) -> int:
    """A folder without checksums, as most that are published; returns its bytes of weights."""
    import ml_dtypes
    import numpy as np
    from flax import nnx
    from safetensors.numpy import save_file

    from perception_jax.interop.binding import source_shapes
    from perception_jax.models.params import flatten
    from perception_jax.models.registry import architecture_of

    config, build = _models()[model]
    leaves = flatten(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(params=0))))
    table = architecture_of(config).table("hf", config, leaves)
    shapes = source_shapes(table, {path: leaf.shape for path, leaf in leaves.items()})
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    total = sum(int(np.prod(shape)) for shape in shapes.values()) * kind.itemsize
    rng = np.random.default_rng(0)
    groups: list[dict[str, np.ndarray]] = [{}]
    names, done = {}, 0
    for name, shape in shapes.items():
        if done > total * len(groups) / shards:
            _save(save_file, folder, groups, shards)
        names[name] = _shard(len(groups), shards)
        array = np.asarray(0.02 * rng.standard_normal(shape, np.float32), kind)
        groups[-1][name] = array
        done += array.nbytes
    _save(save_file, folder, groups, shards)
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = {"model_type": "clip", "architectures": ["CLIPModel"], **config.to_hf()}
    (folder / "config.json").write_text(json.dumps(settings | {"torch_dtype": dtype}))
    return total


def _shard(number: int, count: int) -> str:
    return f"model-{number:05}-of-{count:05}.safetensors"


def _save(save_file: Any, folder: pathlib.Path, groups: list[dict], shards: int) -> None:
    """Writes the last group and starts a new one in its place."""
    save_file(groups[-1], folder / _shard(len(groups), shards), {"format": "pt"})
    groups[-1] = {}
    groups.append({})


def measure(folder: pathlib.Path, weights: int, sides: Sequence[str], rounds: int) -> list[dict]:
    """Every run, printed as they come."""
    runs = []
    for _ in range(rounds):
        for side in sides:
            done = subprocess.run(
                [sys.executable, str(CHILD), "--child", side, str(folder), str(weights)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            run = json.loads(done.stdout.splitlines()[-1])
            run |= {"side": side, "peak_over_weights": run["peak_bytes"] / weights}
            runs.append(run)
            print(
                f"{side:17} {run['seconds']:6.2f} s (cpu {run['cpu_seconds']:.2f})  "
                f"peak {run['peak_over_weights']:.2f}x of {weights / 1e9:.2f} GB, without mapped "
                f"files {run['peak_anonymous_bytes'] / weights:.2f}x; imports {run['imports']:.2f}",
                flush=True,
            )
    return runs


def _touch(nbytes: int) -> None:
    """Uses memory and frees it. A virtual machine gives free pages back to its host within seconds,
    and the first use of a page after that takes ten times as long as the rest of the load."""
    import numpy as np

    np.ones(nbytes, np.uint8)


class Memory:
    """Peak of this process's memory above the start, sampled every few milliseconds."""

    def __init__(self) -> None:
        self._start = self._now()
        self.resident = self.anonymous = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._sample()
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._sample()

    def _sample(self) -> None:
        resident, anonymous = (n - b for n, b in zip(self._now(), self._start, strict=True))
        self.resident = max(self.resident, resident)
        self.anonymous = max(self.anonymous, anonymous)

    @staticmethod
    def _now() -> tuple[int, int]:
        """Resident bytes, and those of them that are no part of a file."""
        _, resident, shared = map(int, pathlib.Path("/proc/self/statm").read_text().split()[:3])
        page = os.sysconf("SC_PAGE_SIZE")
        return resident * page, (resident - shared) * page


def _child(side: str, folder: str, weights: str) -> None:
    start = time.perf_counter()
    load = _to_target() if side == OURS else _to_source(own=side == OWN)
    imports = time.perf_counter() - start
    _touch(2 * int(weights))
    memory = Memory()
    start, cpu = time.perf_counter(), time.process_time()
    kept = load(folder)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    memory.stop()
    del kept
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": cpu,
                "imports": imports,
                "peak_bytes": memory.resident,
                "peak_anonymous_bytes": memory.anonymous,
            }
        )
    )


def _to_target() -> Any:
    import jax
    import numpy as np

    import perception_jax
    from perception_jax import api  # noqa: F401
    from perception_jax.models import clip, llama  # noqa: F401

    jax.devices()

    def load(folder: str) -> Any:
        loaded = perception_jax.load(folder)
        for leaf in jax.tree.leaves(loaded.model):
            flat = np.asarray(leaf).reshape(-1)
            flat[:: PAGE // flat.itemsize].astype(np.float32).sum()
        return loaded

    return load


def _to_source(*, own: bool) -> Any:
    import torch
    import transformers

    def load(folder: str) -> Any:
        (name,) = json.loads((pathlib.Path(folder) / "config.json").read_text())["architectures"]
        model = getattr(transformers, name).from_pretrained(folder, dtype="auto")
        for weight in model.parameters():
            if own:
                weight.data = weight.data.clone()
            flat = weight.detach().reshape(-1)
            flat[:: PAGE // flat.element_size()].to(torch.float32).sum()
        return model

    return load


def main(argv: Sequence[str]) -> None:
    if argv[:1] == ["--child"]:
        _child(*argv[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="clip_l14", choices=tuple(_models()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--folder", help="where the checkpoint is written, instead of $TMPDIR")
    parser.add_argument("--out", type=pathlib.Path, help="JSON with the numbers")
    given = parser.parse_args(argv)
    sides = [OURS]
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        sides += [THEIRS, OWN]
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        weights = write(pathlib.Path(folder), given.model, given.shards, given.dtype)
        runs = measure(pathlib.Path(folder), weights, sides, given.rounds)
    medians = {
        side: {
            key: statistics.median(run[key] for run in runs if run["side"] == side)
            for key in ("seconds", "cpu_seconds", "imports", "peak_over_weights")
        }
        for side in sides
    }
    print(json.dumps(medians, indent=1))
    if given.out:
        given.out.write_text(json.dumps({"runs": runs, "medians": medians}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
