# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 02 GiVE: an image encoder conditioned on an instruction
#
# A CLIP has one embedding per image, which small or secondary objects hardly influence. GiVE
# ([arXiv 2410.20109](https://arxiv.org/abs/2410.20109)) inserts adapters into the frozen image
# tower that attend to an instruction such as "the kite": the same image then has one embedding per
# instruction, and a logit for the presence of the object.
#
# This notebook trains such adapters on fifty images, shows how the relevance map follows the
# instruction, and exports the adapters to PyTorch. The paper's own formulas and numbers could not
# be confirmed; `perception_jax/systems/give/README.md` lists what comes from the paper.
#
# On Colab, set `SOURCE` in the next cell to the address of the repository.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("perception_jax") is None:
    # A checkout, such as the one that contains this notebook, or git+https:// and an address.
    SOURCE = ".."  # @param {type:"string"}
    wanted = f"perception_jax[hub] @ {SOURCE}" if "+" in SOURCE else f"{SOURCE}[hub]"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)

import json
import pathlib

import jax
import numpy as np
import PIL.Image
from flax import nnx

import perception_jax
from perception_jax import viz
from perception_jax.api import load_backbone
from perception_jax.data.images import decode
from perception_jax.data.instructions import instruction_for
from perception_jax.data.scenes import objects as scenes
from perception_jax.data.sources.combine import split
from perception_jax.data.sources.objects import ObjectLines
from perception_jax.systems.give import (
    Give,
    GiveConfig,
    GiveEncoder,
    GiveTask,
    GiveTaskConfig,
    GroupConfig,
    TrainingData,
    conditioned_maps,
    evaluation_of,
    export_merged,
    save_give,
)
from perception_jax.train.config import TrainConfig
from perception_jax.train.loop import run

try:
    from IPython.display import display
except ImportError:  # run as a script: the pictures are in OUT
    display = None

print(f"perception_jax {perception_jax.__version__}, jax {jax.__version__} on {jax.devices()[0]}")

# %% [markdown]
# ## Settings
#
# `BACKBONE` is a hub id, a folder, or a name of weights in the package (`scenes-clip` needs no
# download). `OBJECTS` is a JSONL file with one object per line:
#
#     {"image": "photos/1.jpg", "class": "kite", "caption": "a red kite above the trees"}
#
# Fifty images with two or more objects each are enough to run; if it is empty, some are drawn.

# %% tags=["parameters"]
BACKBONE = "scenes-clip"  # @param {type:"string"}
OBJECTS = ""  # @param {type:"string"}
SIZE = 96  # pixels; more show smaller things and take longer
STEPS = 400
OUT = "runs/02_give"  # pictures and checkpoints go here

# %% [markdown]
# ## Images with objects
#
# Without a file of your own: scenes of twelve classes of objects. Each line has the class and the
# caption of an object.


# %%
def show(picture, name):
    """Keeps a picture as OUT/name.png and displays it in a notebook."""
    image = PIL.Image.fromarray(picture)
    image.save(pathlib.Path(OUT) / f"{name}.png")
    if display is not None:
        display(image)


def write_scenes(folder, count=50):
    """Scenes as images and one line for each object."""
    config = scenes.ObjectScenesConfig(canvas=SIZE, names=scenes.names(12), objects=(2, 3))
    source = scenes.training_scenes(config, seed=1, length=count)
    with open(folder / "objects.jsonl", "w") as lines:
        for index in range(count):
            record = source[index]
            PIL.Image.fromarray(record.image).save(folder / f"{index}.png")
            for item in record.objects:
                line = {"image": f"{index}.png", "class": item.name, "caption": item.caption}
                lines.write(json.dumps({**line, "box": [float(x) for x in item.box]}) + "\n")
    return folder / "objects.jsonl"


pathlib.Path(OUT).mkdir(parents=True, exist_ok=True)
path = pathlib.Path(OBJECTS) if OBJECTS else write_scenes(pathlib.Path(OUT))
train, test = split(ObjectLines(path), every=5)
first = [test[k] for k in range(min(5, len(test)))]
captions = ["\n".join(item.caption for item in record.objects) for record in first]
show(viz.grid.grid([decode(r.image) for r in first], captions, columns=5, cell=190), "images")

# %% [markdown]
# ## Adapters in a frozen tower
#
# Untrained adapters change nothing: their last layer is zero.

# %%
backbone = load_backbone(BACKBONE).at_size(SIZE, mode="llava_pad")
fresh = GiveEncoder(Give(GiveConfig(), backbone.model, rngs=nnx.Rngs(params=0)), backbone)
images = [decode(record.image) for record in first]
instructions = [instruction_for(record.objects[0].name) for record in first]
plain, conditioned = fresh.encode(images), fresh.encode(images, instructions)
change = float(np.abs(plain.embedding - conditioned.embedding).max())
print(f"largest change by fresh adapters: {change:.1e}")

# %% [markdown]
# ## Train
#
# Each row of a batch has an image, a class that is present and one that is absent; the image is
# encoded with both instructions. OITC compares it with captions, OIIC with other images of the same
# class, OID classifies presence. Only adapters and the OID head train.

# %%
processor = backbone.processor
data = TrainingData(
    train,
    GroupConfig(groups=4, images=4),
    processor=processor.image,
    tokenizer=processor.tokenizer,
    hold=True,
)
print(data.index.counts)
task = GiveTask(GiveTaskConfig(batch_size=32), backbone, data)
settings = {
    "steps": STEPS,
    "batch_size": 32,
    "log_every": max(1, STEPS // 8),
    "optim": {"name": "muon", "learning_rate": 3e-3, "warmup_steps": STEPS // 10},
}
result = run(task, TrainConfig.from_mapping(settings), f"{OUT}/training-{SIZE}px-{STEPS}")
trained = GiveEncoder(result.model, backbone)

# %% [markdown]
# ## Evaluate
#
# On every fifth image, which was held out, compared with the same CLIP without an instruction. The
# copy floor is the score of an image of one colour: the class can be copied from the instruction,
# so only the part above the floor comes from the image. Fifty images are few: expect overfitting.

# %%
evaluation = evaluation_of(
    test, processor, classes=data.index.names, federated=False, in_memory=True
)
report = evaluation.run(trained.model).report
scores = report.diagnostics
for stratum in ("all", "overlooked"):
    auc, static = scores["oid_auc"][stratum], scores["static_auc"][stratum]
    if auc is not None:
        print(f"present or absent, {stratum}: AUC {auc:.2f}, without an instruction {static:.2f}")

# %% [markdown]
# ## Relevance maps
#
# For each instruction, the relevance of each patch for the object's presence (attention times the
# gradient of the presence logit). The last instruction names an absent object.


# %%
def over(image, values, side=256):
    """A map over the image in grey."""
    picture = PIL.Image.fromarray(np.asarray(values, np.float32))
    values = np.asarray(picture.resize((side, side), PIL.Image.Resampling.BICUBIC))
    grey = PIL.Image.fromarray(image).convert("L").convert("RGB").resize((side, side))
    return viz.heatmap(np.array(grey), values, vmin=float(values.min()), vmax=float(values.max()))


@jax.jit
def maps_of(model, pixels, instruction):
    return conditioned_maps(model, pixels, instruction, instruction.mask)


cells = []
for record, image in list(zip(first, images, strict=True))[:3]:
    shown = list(dict.fromkeys(item.name for item in record.objects))[:2]
    absent = next(name for name in data.index.names if name not in shown)
    square = processor.image(image).pixels
    cells.append((np.array(PIL.Image.fromarray(square).resize((256, 256))), record.id))
    for name in [*(shown * 2)[:2], absent]:
        words = instruction_for(name)
        found = maps_of(
            trained.model, processor.images([image]), trained.tower([words]).instruction
        )
        share = 1 / (1 + np.exp(-float(found.presence_logit)))
        cells.append((over(square, found.relevance), f"“{words}”\npresent: {share:.0%}"))
show(viz.grid.grid(*zip(*cells, strict=True), columns=4, cell=190), "maps")

# %% [markdown]
# ## Export to PyTorch
#
# `give.safetensors` contains the trained parameters; the folder also contains the backbone in the
# format of `transformers`, and a README with forty lines of torch that combine both.

# %%
save_give(f"{OUT}/give.safetensors", trained.model, backbone)
export_merged(f"{OUT}/merged", trained)
again = GiveEncoder.from_pretrained(f"{OUT}/merged")
same = np.abs(
    again.encode(images, instructions).embedding - trained.encode(images, instructions).embedding
)
print(f"read back: embeddings differ by {float(same.max()):.1e}")
print(sorted(item.name for item in pathlib.Path(f"{OUT}/merged").iterdir()))
