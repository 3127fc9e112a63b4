"""GiVE on scenes: trains adapters that condition the shipped small CLIP on an instruction.

    python -m launch.train --config=configs/give/scenes.py --workdir=runs/give_scenes

Images of four artists with two or three objects each; evaluated on the fifth artist's drawings,
compared with the same CLIP without instructions. `:runlocal` is the same in a few steps.
`:ablation=NAME` starts from all three losses and applies an entry of
`configs.give.common.ABLATIONS`;
`:plus` adds the losses of `systems.give.plus`.
"""

from __future__ import annotations

import ml_collections

from configs.common import parse_arg, trainer
from configs.give.common import RULES, ablation, blocks, data

OPTIM = {
    # AdamW, with which GiVE trains elsewhere, sits several times longer on the plateau here.
    "name": "muon",
    "learning_rate": 3e-3,
    "weight_decay": 0.05,
    "b2": 0.98,
    "rules": RULES,
}
"""Optimizer settings."""


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe of the shipped adapters; `runlocal` shrinks everything."""
    chosen = parse_arg(arg, runlocal=False, ablation="", plus=False)
    tiny = chosen.runlocal
    groups, images = (4, 2) if tiny else (8, 6)
    # Adapters' heads are as wide as the backbone's: 64 would be two and a half of its 160.
    config = blocks(groups=groups, images=images, heads=5)
    # With equal weights the two contrasts, which copying an instruction nearly solves, keep the
    # gradient to themselves: 1,200 steps of 96 rows give an AUC of 0.71 on overlooked objects, 0.75
    # with three times the weight on presence, no more with ten times.
    config.losses.oid = 3.0
    config.train = trainer(
        steps=8 if tiny else 3000,
        batch_size=2 * groups * images,
        log_every=4 if tiny else 50,
        evaluate_every=0 if tiny else 1500,
        checkpoint_every=0 if tiny else 1500,
        optim={**OPTIM, "warmup_steps": 2 if tiny else 100},
    )
    config.backbone = "scenes-clip"
    config.data = data(
        "scenes",
        # The backbone trained at 48; more patches find more of what is small.
        size=72,
        # They stay in memory and come again.
        hold=True,
        names=20 if tiny else 0,
        length=200 if tiny else 16_000,
        # Scenes have no files; for objects of one's own, every tenth image tests.
        test_every=10,
    )
    config.evaluation.update(
        {
            "name": "unseen",
            "batch_size": 256,
            "scenes": 12 if tiny else 400,
            "negatives": 5 if tiny else 30,
        }
    )
    config.report.update(
        {
            "title": "A small CLIP conditioned on instructions",
            "measured_on": "drawings of an artist that never trained",
        }
    )
    if chosen.plus:
        config.plus.update({"dense": 1.0, "altered": True, "generic": 1.0})
        config.data.unnamed = True
    if chosen.ablation:
        config.update_from_flattened_dict(ablation(chosen.ablation))
    else:
        # OIIC costs on this scale (docs/give_scenes.md), so the recipe leaves it out.
        config.losses.oiic = 0.0
    return config
