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
# # 01 Encoders: CLIP and DINOv2 side by side
#
# CLIP is trained to match images with texts, DINOv2 on images alone. This notebook loads one of
# each, embeds a folder of images with both, compares their similarities, shows attention and
# relevance maps, and exports both to PyTorch.
#
# On Colab, set `SOURCE` in the next cell to the address of the repository.
# A GPU or TPU is used if available, but not needed.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("perception_jax") is None:
    # A checkout, such as the one that contains this notebook, or git+https:// and an address.
    SOURCE = ".."  # @param {type:"string"}
    wanted = f"perception_jax[hub] @ {SOURCE}" if "+" in SOURCE else f"{SOURCE}[hub]"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)

import dataclasses
import itertools
import pathlib

import jax
import numpy as np
import PIL.Image
import PIL.ImageOps
import tqdm.auto

import perception_jax
from perception_jax import viz
from perception_jax.data.image_paths import find_images
from perception_jax.data.images import decode
from perception_jax.data.scenes.render import render
from perception_jax.data.scenes.source import portrait
from perception_jax.data.scenes.spec import STYLES, Background, Placement, SceneSpec
from perception_jax.evals.ranking import nearest, unit_rows
from perception_jax.nn import maps

try:
    from IPython.display import display
except ImportError:  # run as a script: the pictures are in OUT
    display = None

print(f"perception_jax {perception_jax.__version__}, jax {jax.__version__} on {jax.devices()[0]}")

# %% [markdown]
# ## Settings
#
# `CLIP` and `DINOV2` are hub ids, folders, or names of weights in the package (`scenes-clip` needs
# no download). `IMAGES` is a folder with at least ten images; if it is empty, some are drawn.
# `LOOK` is a file pattern of the images for the maps (at most three), `TEXTS` the texts for the
# relevance maps.

# %% tags=["parameters"]
CLIP = "openai/clip-vit-base-patch32"  # @param {type:"string"}
DINOV2 = "facebook/dinov2-small"  # @param {type:"string"}
IMAGES = ""  # @param {type:"string"}
LOOK = "scene-*"  # @param {type:"string"}
TEXTS = ("a drawing of a dog", "a drawing of a bus")
SCALE = 2.0  # the input's side for maps, as a multiple of the model's own
OUT = "runs/01_encoders"  # pictures and checkpoints go here

# %% [markdown]
# ## A folder of images
#
# Without a folder of your own: eight objects, each by five artists, and two scenes of two objects.


# %%
def show(picture, name):
    """Keeps a picture as OUT/name.png and displays it in a notebook."""
    image = PIL.Image.fromarray(picture)
    image.save(pathlib.Path(OUT) / f"{name}.png")
    if display is not None:
        display(image)


def two_things(left, right, style):
    """A scene of two things side by side."""
    spots = ((left, 0.27), (right, 0.73))
    placements = [Placement(concept=name, style=style, x=x, y=0.5, size=0.4) for name, x in spots]
    background = Background(kind="gradient", colours=("grey", "white"), seed=0)
    return render(SceneSpec(background=background, placements=tuple(placements)), 256).image


def drawings():
    """Names and images."""
    things = ("banana", "bus", "cat", "dog", "lemon", "owl", "rose", "taxi")
    for thing, artist in itertools.product(things, STYLES):
        yield f"{thing}-{artist}", portrait(thing, artist, canvas=256, seed=0)
    yield "scene-bus-dog", two_things("bus", "dog", "fluent_flat")
    yield "scene-dog-bus", two_things("dog", "bus", "noto")


folder = pathlib.Path(IMAGES or f"{OUT}/images")
pathlib.Path(OUT).mkdir(parents=True, exist_ok=True)
if not IMAGES:
    folder.mkdir(exist_ok=True)
    for name, image in drawings():
        PIL.Image.fromarray(image).save(folder / f"{name}.png")

files = find_images(folder)
images = [decode(file) for file in files]
names = [file.stem for file in files]
show(viz.grid.grid(images[:42], names[:42], columns=7, cell=112, font_size=11), "images")

# %% [markdown]
# ## Load
#
# `load` reads the checkpoints of `transformers`, open_clip, timm and the authors' own code. Its
# report lists every tensor.

# %%
encoders = {"CLIP": perception_jax.load(CLIP), "DINOv2": perception_jax.load(DINOV2)}


def tower_of(loaded):
    """The image tower: a CLIP has one, a DINOv2 is one."""
    return getattr(loaded.model, "vision", loaded.model)


for name, loaded in encoders.items():
    count = sum(leaf.size for leaf in jax.tree.leaves(tower_of(loaded)))
    print(f"{name}: image tower of {count:,} parameters for {loaded.processor.image.size} px")
    print(loaded.report, end="\n\n")

# %% [markdown]
# ## Embed the folder
#
# The processor decodes, resizes and crops according to the checkpoint. All batches have the same
# size, so that the tower compiles once.


# %%
@jax.jit
def embed_batch(tower, pixels):
    return tower(pixels).embedding


def embed(loaded, files, name, batch=16):
    """One embedding per file, [files, E]."""
    rows = []
    for start in tqdm.auto.trange(0, len(files), batch, desc=name, unit="batch"):
        some = files[start : start + batch]
        full = some + some[-1:] * (batch - len(some))
        rows.append(embed_batch(tower_of(loaded), loaded.processor.images(full))[: len(some)])
    return np.concatenate(rows).astype(np.float32)


embeddings = {name: embed(loaded, files, name) for name, loaded in encoders.items()}

# %% [markdown]
# ## Nearest neighbours
#
# Some images with their three nearest neighbours in each space, and the cosines. CLIP tends to
# return the same *class*, DINOv2 the same *appearance*: pose, shape, texture.

# %%
colours = {name: viz.colormap.categorical(k) for k, name in enumerate(encoders)}


def framed(image, colour):
    square = PIL.ImageOps.pad(PIL.Image.fromarray(image), (256, 256), color="white")
    return np.array(PIL.ImageOps.expand(square, border=10, fill=colour))


asked = np.linspace(0, len(files) - 1, 5).round().astype(int)
cells = []
for index in asked:
    cells.append((framed(images[index], "white"), names[index]))
    for name, rows in embeddings.items():
        found = nearest(rows[[index]], rows, 4)
        pairs = zip(found.indices[0].tolist(), found.scores[0], strict=True)
        for other, cosine in [pair for pair in pairs if pair[0] != index][:3]:
            caption = f"{name} {cosine:.2f}\n{names[other]}"
            cells.append((framed(images[other], colours[name]), caption))
show(viz.grid.grid(*zip(*cells, strict=True), columns=7, cell=130, font_size=12), "neighbours")

# %% [markdown]
# The cosines of all pairs make one matrix for each space, here in the order of the file names: a
# light block on the diagonal is a group of similar images. The rank correlation of the two matrices
# measures their agreement on the order of all pairs (1: the same order, 0: unrelated).

# %%
first, second = np.triu_indices(len(files), k=1)  # every pair once
cosines, ranks, pictures, captions = {}, {}, [], []
for name, rows in embeddings.items():
    unit = unit_rows(rows, name)
    matrix = unit @ unit.T
    cosines[name] = matrix[first, second]
    ranks[name] = cosines[name].argsort().argsort() / (len(first) - 1)  # 0 lowest, 1 highest
    low, high = cosines[name].min(), cosines[name].max()
    picture = PIL.Image.fromarray(viz.colormap.apply(matrix, vmin=low, vmax=high))
    pictures.append(np.array(picture.resize((480, 480), PIL.Image.Resampling.NEAREST)))
    captions.append(f"{name}: cosines of all pairs, from {low:.2f} (dark) to {high:.2f} (light)")
show(viz.grid.grid(pictures, captions, columns=2, cell=480, font_size=14), "matrices")

near = {name: nearest(rows, rows, 6).indices for name, rows in embeddings.items()}
both = [len(set(a) & set(b)) - 1 for a, b in zip(*near.values(), strict=True)]
print(f"rank correlation of all cosines: {np.corrcoef(*ranks.values())[0, 1]:.2f}")
print(
    f"of the five nearest in common: {np.mean(both) / 5:.0%}, by chance {5 / (len(files) - 1):.0%}"
)

# %% [markdown]
# Where two images are similar for CLIP but not for DINOv2, CLIP may not represent the difference.
# The [MMVP](https://arxiv.org/abs/2401.06209) benchmark was built from pairs with a cosine above
# 0.95 in CLIP and below 0.6 in DINOv2, both of size L/14. Cosines of other models are distributed
# differently, so the pairs here are chosen by rank: of the top 5 % of one model, the lowest of the
# other.

# %%
strict = (cosines["CLIP"] > 0.95) & (cosines["DINOv2"] < 0.6)
print(f"pairs by MMVP's thresholds: {strict.sum()} of {len(first)}")


def cards(one, other):
    """Two images, the second over a corner of the first."""
    sheet = PIL.Image.new("RGB", (256, 256), "white")
    for image, place in ((one, (0, 0)), (other, (106, 106))):
        sheet.paste(PIL.Image.fromarray(framed(image, "white")).resize((150, 150)), place)
    return np.array(sheet)


cells = []
for alike, apart in (("CLIP", "DINOv2"), ("DINOv2", "CLIP")):
    top = ranks[alike].argsort()[-max(5, len(first) // 20) :]
    for pair in top[ranks[apart][top].argsort()][:5]:
        a, b = first[pair], second[pair]
        caption = f"{alike} {cosines[alike][pair]:.2f}, {apart} {cosines[apart][pair]:.2f}"
        cells.append((cards(images[a], images[b]), f"{caption}\n{names[a]}\n{names[b]}"))
show(viz.grid.grid(*zip(*cells, strict=True), columns=5, cell=190), "pairs")

# %% [markdown]
# ## Maps
#
# - *Attention*: attention of the token that becomes the embedding, in the last layer.
# - *For a text*: relevance of each patch, attention times the gradient of the cosine.
# - *Patches*: the first three principal components of the patch features as red, green and blue.
#   All images share the components, so equal colours mean similar patches.
#
# The colours of a map span its own range. Isolated bright patches in DINOv2's attention are known
# artefacts; the models with registers do not have them.

# %%
look = [file for file in files if file.match(LOOK)][:3] or files[:3]


def enlarged(loaded, side):
    """The processor for another size; it keeps the largest centre square."""
    image = dataclasses.replace(loaded.processor.image, size=side, resize=None)
    return dataclasses.replace(loaded.processor, image=image)


def map_pixels(loaded):
    """The images for the maps, at SCALE times the model's own size in whole patches."""
    patch = tower_of(loaded).patch_embed.patch
    side = round(SCALE * loaded.processor.image.size / patch) * patch
    return enlarged(loaded, side).images(look)


@jax.jit
def attention_and_patches(tower, pixels):
    out = tower(pixels)
    return maps.class_attention(tower, pixels), maps.patch_pca(out.patches, out.grid)


@jax.jit
def relevance(tower, pixels, texts):
    return maps.text_maps(tower, pixels, texts).relevance  # [T, B, rows, columns]


clip = encoders["CLIP"]
texts = clip.model.text(clip.processor.texts(TEXTS)).embedding
for_texts = np.asarray(relevance(tower_of(clip), map_pixels(clip), texts))
inside = {}
for name, loaded in encoders.items():
    found = attention_and_patches(tower_of(loaded), map_pixels(loaded))
    inside[name] = [np.asarray(part) for part in found]


# %%
def resized(values, side=256):
    picture = PIL.Image.fromarray(np.asarray(values, np.float32))
    return np.asarray(picture.resize((side, side), PIL.Image.Resampling.BICUBIC))


def over(image, values):
    """A map over the image in grey."""
    grey = np.array(PIL.Image.fromarray(image).convert("L").convert("RGB"))
    low, high = float(values.min()), float(values.max())
    return viz.heatmap(grey, resized(values).clip(low, high), vmin=low, vmax=high)


def coloured(components):
    channels = [resized(components[..., k]).clip(0, 1) for k in range(3)]
    return (255 * np.stack(channels, axis=-1)).astype(np.uint8)


cells = []
for row, file in enumerate(look):
    square = {
        name: enlarged(loaded, 256).image(decode(file)).pixels for name, loaded in encoders.items()
    }
    cells.append((square["CLIP"], file.stem))
    for text, values in zip(TEXTS, for_texts[:, row], strict=True):
        cells.append((over(square["CLIP"], values), f"CLIP: for “{text}”"))
    for name, (attention, _) in inside.items():
        cells.append((over(square[name], attention[row]), f"{name}: attention"))
    for name, (_, components) in inside.items():
        cells.append((coloured(components[row]), f"{name}: patches"))
columns = len(cells) // len(look)
show(viz.grid.grid(*zip(*cells, strict=True), columns=columns, cell=150, font_size=12), "maps")

# %% [markdown]
# ## Export to PyTorch
#
# `export` writes a folder that `transformers` loads unchanged (other layouts: open_clip, timm, and
# this library's own). The folder is loaded again and compared, also with `transformers` if it is
# installed.

# %%
compare = all(importlib.util.find_spec(module) for module in ("torch", "transformers"))
if compare:
    import torch
    import transformers

for name, loaded in encoders.items():
    target = f"{OUT}/{name.lower()}"
    perception_jax.export(loaded, target, overwrite=True)
    pixels = loaded.processor.images(look)
    with jax.default_matmul_precision("highest"):  # accelerators multiply more coarsely otherwise
        before = np.asarray(tower_of(loaded)(pixels).pooled)
        after = np.asarray(tower_of(perception_jax.load(target))(pixels).pooled)
    np.testing.assert_array_equal(after, before)
    print(f"{target}: read back, the same numbers")
    if compare:
        theirs = transformers.AutoModel.from_pretrained(target, dtype=torch.float32).eval()
        theirs = getattr(theirs, "vision_model", theirs)
        with torch.no_grad():
            channels_first = torch.tensor(np.asarray(pixels).transpose(0, 3, 1, 2))
            expected = theirs(pixel_values=channels_first).pooler_output.numpy()
        print(f"{target}: in transformers, largest difference {np.abs(after - expected).max():.1e}")
if not compare:
    print("To compare with PyTorch: pip install torch transformers")

# %% [markdown]
# ## Further reading
#
# `docs/encoders.md` explains how to choose, load, tap and convert encoders. The same maps for any
# folder: `python -m launch.predict encoder --help`. Any checkpoint into any layout:
# `python -m launch.convert --help`.
