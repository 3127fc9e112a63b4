"""The schedule of the recipes against that of `transformers`, update by update."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
import torch
import transformers

from configs.mof import llava15_finetune_imof, llava15_pretrain_clip, llava15_pretrain_imof
from perception_jax.train.config import TrainConfig
from perception_jax.train.optim import schedule


@pytest.mark.parametrize(
    ("module", "argument", "batch"),
    [
        (llava15_pretrain_clip, "samples=20000", 256),
        (llava15_pretrain_imof, "samples=7001,lr=0.002", 256),
        (llava15_finetune_imof, "samples=5555,batch=176", 176),
    ],
)
def test_learning_rates_are_those_of_transformers(module, argument, batch):
    settings = module.get_config(argument)
    config = TrainConfig.from_mapping(settings.train.to_dict())
    division = settings.division
    assert config.batch_size == batch
    loaded = math.ceil(settings.data.scenes / (division.rows * division.devices))
    steps = loaded // division.accumulate
    assert config.steps == steps
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=config.optim.learning_rate)
    theirs = transformers.get_cosine_schedule_with_warmup(
        optimizer, num_warmup_steps=math.ceil(steps * 0.03), num_training_steps=steps
    )
    expected = []
    for _ in range(steps):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    found = np.asarray(jax.vmap(schedule(config.optim, steps))(np.arange(steps)))
    assert found[0] == expected[0] == 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * config.optim.learning_rate)
