"""Training steps per second of the trainer's own step, against the same model in torch.

python tests/bench/train_step.py [--models=CLIP-ViT-B/16,decoder-160m] [--batch=4] [--length=256]
    [--compile] [--calls=5] [--out=FILE.json]

Ours is the step that `launch.train` compiles (`train.task_step`); torch's is a model of
`transformers` (SDPA) with its loss, eager and with `torch.compile`. Both clip the gradient's global
norm and update with AdamW in float32; on a GPU the models compute in bfloat16 (by autocast).
Every side has a process of its own, as the threads of one library disturb the other's; they take
turns of two steps, of which the second is timed, and the median counts. On a CPU matrix products
of both libraries are measured before and after: the share is model FLOPs a second (recomputation
does not count) against the fastest product's. On a GPU it is the MFU.
"""

from __future__ import annotations

import os

# Both sides share the GPU's memory. Set before jax is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measuring import Call, machine, product_rate, products, seconds_per_call, wait

from perception_jax.api import Processor
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.tokenization import ClipTokenizer
from perception_jax.models.clip.config import ClipConfig, VisionConfig
from perception_jax.models.llama.config import LlamaConfig
from perception_jax.models.llama.modeling import Llama
from perception_jax.models.shardings import SHARDINGS
from perception_jax.nn.text_tower import TextConfig
from perception_jax.ops.next_token import next_token_loss
from perception_jax.shard import flops
from perception_jax.shard import mesh as mesh_lib
from perception_jax.systems.contrastive.data import ContrastiveData
from perception_jax.systems.contrastive.task import ContrastiveConfig, ContrastiveTask
from perception_jax.train.config import TrainConfig
from perception_jax.train.task_step import TaskStep

OPTIM = {"learning_rate": 1e-4, "schedule": "constant", "weight_decay": 0.01, "clip_norm": 1.0}

WARM_UP = 2
"""Steps of each side before those that count."""

TINY_CLIP = ClipConfig(
    vision=VisionConfig(image_size=32, patch_size=16, width=64, depth=2, heads=2, mlp_dim=128),
    text=TextConfig(vocab_size=600, context=16, width=64, depth=2, heads=2, mlp_dim=128),
    embed_dim=32,
)


def decoder(**sizes: int) -> LlamaConfig:
    """The size of JackFram/llama-160m, or another."""
    published = {"vocab_size": 32000, "context": 2048, "width": 768, "depth": 12, "mlp_dim": 3072}
    heads = {"heads": 12, "kv_heads": 12, "head_width": 64}
    return LlamaConfig(**{**published, **heads, **sizes})


MODELS: Mapping[str, Callable[[], ClipConfig | LlamaConfig]] = {
    "CLIP-ViT-B/16": ClipConfig.vit_b16,
    "CLIP-ViT-L/14-336": ClipConfig.vit_l14_336,
    "decoder-160m": decoder,
    "tiny-clip": lambda: TINY_CLIP,
    "tiny-decoder": lambda: decoder(
        vocab_size=512, width=64, depth=2, mlp_dim=128, heads=2, kv_heads=2
    ),
}


class LanguageTask:
    """Predicts the next token; see `train.task.Task`."""

    trainable = nnx.Param
    shardings = SHARDINGS

    def __init__(self, config: LlamaConfig):
        self.config = config

    def init(self, key: jax.Array) -> nnx.Module:
        return Llama(self.config, rngs=nnx.Rngs(params=key))

    def pretrained(self, targets: Any) -> dict[str, Any]:
        return {}

    def loss(self, model: Llama, batch: Any, key: jax.Array) -> Any:
        hidden = model(batch["ids"], head=False).tokens
        return next_token_loss(hidden, model.logits, batch["ids"]).mean(), {}


@dataclasses.dataclass(frozen=True)
class Ours:
    """A training step of the trainer, compiled.

    Attributes:
      call: does a step and returns its loss.
      flops: of the model, for a step.
      parameters: that train.
    """

    call: Call
    flops: int
    parameters: int


def on_gpu() -> bool:
    return jax.default_backend() != "cpu"


def our_task(config: Any, batch: int) -> Any:
    if isinstance(config, LlamaConfig):
        return LanguageTask(config)
    text = config.text
    processor = Processor(
        image=ImageProcessor(size=config.vision.image_size),
        tokenizer=ClipTokenizer.shipped(text.vocab_size, text.context),
    )
    data = ContrastiveData([], processor, batch_size=batch, seed=0)
    return ContrastiveTask(ContrastiveConfig(), config, data=data)


def arrays(config: Any, batch: int, length: int) -> dict[str, np.ndarray]:
    """A batch of random pixels and ids."""
    rng = np.random.default_rng(0)
    if isinstance(config, LlamaConfig):
        return {"ids": rng.integers(3, config.vocab_size, (batch, length), np.int32)}
    side, text = config.vision.image_size, config.text
    ids = rng.integers(3, text.vocab_size - 2, (batch, text.context), np.int32)
    ids[:, -1] = text.vocab_size - 1  # ends the text
    return {"image": rng.integers(0, 256, (batch, side, side, 3), np.uint8), "ids": ids}


def our_step(config: Any, given: argparse.Namespace) -> Ours:
    settings = TrainConfig.from_mapping(
        {
            "steps": 1000,
            "batch_size": given.batch,
            "compute_dtype": "bfloat16" if on_gpu() else "float32",
            "optim": OPTIM,
        }
    )
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        step = TaskStep.of(our_task(config, given.batch), settings, mesh)
        split = mesh_lib.batch_sharding(mesh)
        batch = jax.device_put(arrays(config, given.batch, given.length), split)
        compiled = step.trace(batch).compile()
        state = [step.init()]

    def call() -> jax.Array:
        state[0], metrics = compiled.call(state[0], batch)
        return metrics["loss"]

    count = sum(leaf.size for leaf in step.state.trainable.values())
    return Ours(call, compiled.model_flops, count)


def their_model(config: Any) -> Any:
    import transformers

    if isinstance(config, LlamaConfig):
        settings = transformers.LlamaConfig.from_dict(config.to_hf() | {"use_cache": False})
        return transformers.LlamaForCausalLM(settings)
    return transformers.CLIPModel(transformers.CLIPConfig.from_dict(config.to_hf()))


def their_step(config: Any, given: argparse.Namespace, *, compiled: bool) -> tuple[Call, int]:
    """A step that returns its loss, and the number of parameters."""
    import torch

    device = "cuda" if on_gpu() else "cpu"
    model = their_model(config).train().to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIM["learning_rate"],
        weight_decay=OPTIM["weight_decay"],
        fused=True,
    )
    batch = {
        name: torch.from_numpy(array).to(device)
        for name, array in arrays(config, given.batch, given.length).items()
    }
    ids = batch["ids"].long()
    if isinstance(config, LlamaConfig):

        def loss() -> Any:
            return model(input_ids=ids, labels=ids).loss

    else:
        mean, std = (
            torch.tensor(values, device=device)
            for values in (ImageProcessor(size=1).mean, ImageProcessor(size=1).std)
        )

        def loss() -> Any:
            pixels = ((batch["image"] / 255.0 - mean) / std).permute(0, 3, 1, 2)
            return model(input_ids=ids, pixel_values=pixels, return_loss=True).loss

    forward = torch.compile(loss, dynamic=False) if compiled else loss

    def call() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu()):
            value = forward()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM["clip_norm"])
        optimizer.step()
        return value.detach()

    return call, sum(parameter.numel() for parameter in model.parameters())


def child(name: str, side: str, given: argparse.Namespace) -> None:
    """Prepares a side, prints what it is, and then takes a step for each line that it reads."""
    config = MODELS[name]()
    if side == "ours":
        ours = our_step(config, given)
        call, about = ours.call, {"parameters": ours.parameters, "flops": ours.flops}
    else:
        call, count = their_step(config, given, compiled=side == "compiled")
        about = {"parameters": count}
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        # What a side frees goes back to a virtual machine's host during the others' turns,
        # and costs it seconds at its next step: in training, a step follows a step.
        wait(call())
        start = time.perf_counter()
        wait(call())
        print(time.perf_counter() - start, flush=True)


class Side:
    """A side in a process of its own."""

    def __init__(self, name: str, side: str, given: argparse.Namespace) -> None:
        sizes = [f"--batch={given.batch}", f"--length={given.length}"]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *sizes, "--child", name, side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about: dict[str, int] = json.loads(self._line())

    def step(self) -> float:
        """Seconds of a step."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self._line())

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a side ended with exit code {self.process.wait()}; see above.")
        return line


def fastest_product(against: bool) -> float | None:
    """FLOP/s of the fastest matrix product of this CPU; None on a GPU."""
    if on_gpu():
        return None
    calls = products(against)
    return product_rate(seconds_per_call(calls, 5), calls)


def measured(name: str, given: argparse.Namespace, against: bool) -> list[dict[str, Any]]:
    """A row for each side, printed."""
    names = ["ours"]
    if against:
        names += ["eager", "compiled"] if given.compile else ["eager"]
    before = fastest_product(against)
    sides = {side: Side(name, side, given) for side in names}
    flops_of_step = sides["ours"].about["flops"]
    count = {side.about["parameters"] for side in sides.values()}
    assert len(count) == 1, count
    print(f"# {name}: {count.pop() / 1e6:.1f} M parameters", flush=True)
    times: dict[str, list[float]] = {side: [] for side in names}
    for turn in range(WARM_UP + given.calls):
        for side in names:
            seconds = sides[side].step()
            if turn >= WARM_UP:
                times[side].append(seconds)
    for side in sides.values():
        side.end()
    taken = {side: statistics.median(found) for side, found in times.items()}
    after = fastest_product(against)
    best = max(before, after) if before else flops.peak_flops(jax.devices()[0].device_kind)
    rows = []
    for side in names:
        rate = flops_of_step / taken[side]
        row = {
            "model": name,
            "batch": given.batch,
            "side": side,
            "steps_per_s": 1 / taken[side],
            "ours_over_it": taken[side] / taken["ours"],
            "flops_per_s": rate,
            "share": rate / best if best else None,
        }
        share = f"  {rate / best:.0%} of {best / 1e9:.0f} GFLOP/s" if best else ""
        print(
            f"{name:18} batch {given.batch}  {side:9} {row['steps_per_s']:8.3f} steps/s  "
            f"ours is {row['ours_over_it']:.2f}x{share}",
            flush=True,
        )
        rows.append(row)
    return rows


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        default=["CLIP-ViT-B/16", "decoder-160m"],
        type=lambda text: text.split(","),
        help=", ".join(MODELS),
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a text")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--calls", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--out", type=pathlib.Path, help="JSON with the numbers")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.child:
        child(*given.child, given)
        return
    against = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    dtype = jnp.bfloat16 if on_gpu() else jnp.float32
    found: dict[str, Any] = {"machine": machine(dtype), "rows": []}
    print(json.dumps(found["machine"]), flush=True)
    for name in given.models:
        found["rows"] += measured(name, given, against)
        if given.out:
            given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
