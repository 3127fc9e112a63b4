"""Settings shared by the GiVE configs.

The recipe is this library's (the paper's own could not be confirmed): AdamW, 2e-4 at 1,024 rows,
500 warm-up steps, cosine to 0.
"""

from __future__ import annotations

from typing import Any

import ml_collections

from configs.common import to_config_dict, trainer
from perception_jax.data.augment import ImageAugment
from perception_jax.errors import ConfigError

RULES = ((r"(^|/)(bias|scale|gate)$", 1.0, False), (r".*",))
"""No weight decay on norms and biases."""
RATE, ROWS = 2e-4, 1024
"""Learning rate at a batch of this many rows, scaled with the number of rows."""


def blocks(*, groups: int, images: int, heads: int | None = None) -> ml_collections.ConfigDict:
    """Everything but the trainer's settings, the backbone and the data."""
    config = ml_collections.ConfigDict({"system": "give"})
    config.adapter = ml_collections.ConfigDict(
        {
            # None: one head for 64 of the image tower's width.
            "heads": ml_collections.FieldReference(heads, field_type=int),
            "layers": "spread",
            "gate": "none",
            "connector": "mlp",
        }
    )
    config.losses = ml_collections.ConfigDict(
        {"oitc": 1.0, "oiic": 1.0, "oid": 1.0, "absent_rows": True, "oiic_temperature": 0.07}
    )
    # The "plus" profile (see `systems.give.plus`); all off is GiVE as specified.
    config.plus = ml_collections.ConfigDict({"dense": 0.0, "altered": False, "generic": 0.0})
    # Switches for ablations: whether adapters see an instruction without its padding, or at all.
    config.mask = True
    config.instruction = True
    config.sampler = ml_collections.ConfigDict(
        {"grouped": True, "groups": groups, "images": images}
    )
    # What the backward pass computes again instead of keeping it: a name of `nn.stack.REMAT`.
    config.remat = "none"
    config.evaluation = ml_collections.ConfigDict(
        {
            # Name under which its numbers are logged.
            "name": "test",
            # Images per device call, over all devices.
            "batch_size": 64,
            # Scenes only: how many, and absent names that are asked about in each.
            "scenes": 400,
            "negatives": 30,
        }
    )
    config.report = ml_collections.ConfigDict(
        {"title": "GiVE", "measured_on": "images that were not trained on"}
    )
    return config


def data(source: str, *, size: int, **settings: Any) -> ml_collections.ConfigDict:
    """Settings of the records' source and of the batches.

    Args:
      source: "scenes" draws them; anything else with named objects is read by `data.sources`:
        canonical MOInst records (`launch.import_moinst`), LVIS, COCO, JSON lines.
      size: side of the model's image, pixels.
      settings: those that differ from the defaults below.
    """
    config = ml_collections.ConfigDict(
        {
            "source": source,
            # Kind of the source (see `data.sources`); "" guesses it where there is no doubt.
            "kind": "",
            # Test records; "" keeps every so many of the source, and 0 of them does not test.
            "test": "",
            "test_every": 0,
            # Share of the records that may be skipped as unusable, in training and evaluation.
            "max_bad_fraction": 0.01,
            # Folder of the image files; "" lets the reader find them.
            "images": "",
            "size": size,
            # "hf_crop" cuts the centre out, "llava_pad" keeps everything and adds bars; "" does
            # what the backbone's own processor does.
            "mode": "",
            # Caption of objects that have none, e.g. "a photo of a {}."; "" leaves them out.
            "template": "",
            # LVIS: only listed classes are known to be absent.
            "federated": False,
            # Loading processes; 0 loads in threads.
            "workers": 0,
            # Process each image once and keep it, for data that fit in memory.
            "hold": False,
            # What changes a training image: fields of `data.augment.ImageAugment`; off. Its colour
            # part makes captions that name colours wrong.
            "augment": to_config_dict(ImageAugment()),
            # Scenes only: objects in each, their shortest and longest side in sides of the image,
            # how many different names there are (0 for all 443), whether half of the captions leave
            # the name out, and how many different scenes.
            "objects": (2, 3),
            "sides": (0.3, 0.7),
            "names": 0,
            "unnamed": False,
            "length": 16_000,
        }
    )
    config.update(settings)
    return config


def published(
    backbone: str,
    *,
    size: int,
    steps: int,
    groups: int = 64,
    images: int = 8,
    mode: str = "hf_crop",
) -> ml_collections.ConfigDict:
    """A config for MOInst-like records and a published backbone.

    Args:
      backbone: hub id or folder.
      size: side of the images, pixels.
      steps: of training; 235 are an epoch of MOInst at 1,024 rows.
      mode: "hf_crop" cuts the centre out, "llava_pad" keeps everything and adds bars.
    """
    config = blocks(groups=groups, images=images)
    rows = 2 * groups * images
    config.backbone = backbone
    config.train = trainer(
        steps=steps,
        batch_size=rows,
        log_every=50,
        evaluate_every=500,
        checkpoint_every=500,
        compute_dtype="bfloat16",
        optim={
            "learning_rate": RATE * rows / ROWS,
            "weight_decay": 0.05,
            "b2": 0.98,
            "eps": 1e-6,
            "warmup_steps": 500,
            "rules": RULES,
        },
    )
    config.remat = "full"
    config.data = data(
        "data/moinst/train.jsonl", test="data/moinst/test.jsonl", size=size, mode=mode, workers=8
    )
    config.report.title = f"GiVE on {backbone}"
    return config


ABLATIONS = {
    "full": {},
    "no_oitc": {"losses.oitc": 0.0},
    "no_oiic": {"losses.oiic": 0.0},
    "no_oid": {"losses.oid": 0.0},
    # OITC alone on random batches.
    "oitc_unstructured": {"losses.oiic": 0.0, "losses.oid": 0.0, "sampler.grouped": False},
    # OIIC without rows conditioned on an absent class.
    "no_absent_rows": {"losses.absent_rows": False},
    # One linear layer instead of the two-layer MLP between text and image width.
    "linear_connector": {"adapter.connector": "linear"},
    "first_half": {"adapter.layers": "first half"},
    "last_half": {"adapter.layers": "last half"},
    "all_layers": {"adapter.layers": "all"},
    "tanh_gate": {"adapter.gate": "tanh"},
    # Adapters also attend to the padding of the instruction.
    "no_mask": {"mask": False},
    # Adapters always get the same generic instruction.
    "no_instruction": {"instruction": False},
}
"""Settings that each ablation changes, by its name. Names and switches are this library's; the
paper's own table could not be confirmed. The frozen backbone is in every table, as "static"."""


def ablation(name: str) -> dict[str, bool | float | str]:
    """Settings (dotted path: value) of the ablation of that name.

    Raises:
      ConfigError: there is no such ablation.
    """
    if name not in ABLATIONS:
        raise ConfigError(f"expected one of the ablations {', '.join(ABLATIONS)}, found {name!r}")
    return dict(ABLATIONS[name])
