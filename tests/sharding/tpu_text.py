"""A program: compiles the training step of a language model of Vicuna 7B's widths, two blocks deep,
for a TPU slice that is not there.

python -m tests.sharding.tpu_text all|lora; needs libtpu, prints one line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

import jax
from flax import nnx
from jax.experimental import topologies

from perception_jax.api import Loaded, Processor
from perception_jax.models.llama.config import LlamaConfig
from perception_jax.models.llama.modeling import Llama
from perception_jax.nn.lora import LoraConfig
from perception_jax.shard import mesh as mesh_lib
from perception_jax.shard import program
from perception_jax.systems.text.task import TextTask, TextTaskConfig
from perception_jax.train.config import TrainConfig
from perception_jax.train.task_step import TaskStep

ROWS, LENGTH, FSDP, TENSOR = 24, 2623, 8, 2
CONFIG = dataclasses.replace(LlamaConfig.vicuna_7b(), depth=2)


def main(kind: str) -> None:
    slice_ = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    mesh = mesh_lib.make_mesh(1, FSDP, TENSOR, devices=slice_.devices)
    model = nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(params=0)))
    base = Loaded(model=model, config=CONFIG, processor=Processor(image=None, tokenizer=None))
    lora = LoraConfig(rank=128, alpha=256.0) if kind == "lora" else None
    task = TextTask(TextTaskConfig(batch_size=ROWS, length=LENGTH, lora=lora), base, None)
    settings = TrainConfig.from_mapping(
        {"steps": 10, "batch_size": ROWS, "compute_dtype": "bfloat16"}
    )
    with jax.set_mesh(mesh):
        step = TaskStep.of(task, settings, mesh)
        compiled = step.trace(*task.batch_shapes()).lowered.compile()
    found = {r for r in program.results(compiled) if r.dtype.startswith(("f", "bf"))}
    part = [r for r in found if CONFIG.vocab_size // TENSOR in r.shape]
    everything = set(program.results(compiled))
    print(
        json.dumps(
            {
                "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
                "collectives": len([r for r in everything if r.is_collective]),
                "whole_batch": [str(r) for r in everything if len(r.shape) > 2 and ROWS in r.shape],
                "whole_vocabulary": [str(r) for r in found if CONFIG.vocab_size in r.shape],
                "split_vocabulary": len(part),
                "logits": max(math.prod(r.shape) for r in part) * TENSOR,
                "rows": ROWS // FSDP,
                "length": LENGTH,
                "vocabulary": CONFIG.vocab_size,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
