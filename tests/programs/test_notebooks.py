"""The notebooks of colab/: each runs on tiny weights, and both of its files say the same.

A notebook is a pair that jupytext keeps: NAME.py in the percent format, which is read and reviewed,
and NAME.ipynb, which Colab opens. After a change of either: `jupytext --sync colab/NAME.py` (extra
[docs]).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import PIL.Image
import pytest
from flax import nnx

import perception_jax
from perception_jax.api import Loaded, Processor
from perception_jax.data.processors import ImageProcessor
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.dinov2.modeling import Dinov2
from perception_jax.ops.image import IMAGENET_MEAN, IMAGENET_STD
from perception_jax.testing import tiny_llama
from tests.arrays import drawn

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "colab"
_MARK = re.compile(r"^# %%(?: \[(?P<kind>\w+)\])?(?P<options>.*)$")
_OPTION = re.compile(r"(\w+)=(\[[^\]]*\]|\S+)")
_HEADER = re.compile(r"\A# ---\n.*?\n# ---\n", re.DOTALL)
_SYNC = "run: jupytext --sync colab/*.py"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """How a notebook runs here.

    Attributes:
      settings: writes what the settings name into a folder, and gives them: values by name, for
        after the cell tagged "parameters".
      pictures: files that must be there afterwards, in the folder.
      says: patterns that its output must hold.
    """

    settings: Callable[[pathlib.Path], Mapping[str, Any]]
    pictures: tuple[str, ...]
    says: tuple[str, ...]


def tiny_dinov2(folder: pathlib.Path) -> None:
    """A checkpoint of random weights, as the hub has them."""
    config = Dinov2Config(image_size=28, width=32, depth=2, heads=2, mlp_dim=128)
    image = ImageProcessor(size=56, resize=64, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    perception_jax.export(
        Loaded(
            model=drawn(lambda: Dinov2(config, rngs=nnx.Rngs(params=0))),
            config=config,
            processor=Processor(image=image, tokenizer=None),
        ),
        folder,
    )


def encoders(folder: pathlib.Path) -> Mapping[str, Any]:
    tiny_dinov2(folder / "dinov2")
    return {"CLIP": "scenes-clip", "DINOV2": f"{folder}/dinov2", "OUT": f"{folder}/out"}


def with_torch(*patterns: str) -> tuple[str, ...]:
    """The patterns if the notebook can compare with PyTorch."""
    found = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    return patterns if found else ()


def give(folder: pathlib.Path) -> Mapping[str, Any]:
    return {"BACKBONE": "scenes-clip", "SIZE": 48, "STEPS": 12, "OUT": f"{folder}/out"}


def language(folder: pathlib.Path) -> Mapping[str, Any]:
    perception_jax.export(tiny_llama.loaded(), folder / "llama")
    settings = {"MODEL": f"{folder}/llama", "LAYER": 1, "TOKENS": 8, "OUT": f"{folder}/out"}
    return {**settings, "PROMPT": "the cat sat", "TURNS": ["the cat", "a hat"]}


def pairs(folder: pathlib.Path) -> Mapping[str, Any]:
    return {"EACH": 2, "ABOVE": 0.5, "BELOW": 0.99, "OUT": f"{folder}/out"}


TRIALS = {
    "01_encoders": Trial(
        settings=encoders,
        pictures=tuple(
            f"out/{name}.png" for name in ("images", "neighbours", "matrices", "pairs", "maps")
        ),
        says=(
            "CLIP: image tower of 1,330,240 parameters for 48 px",
            r"rank correlation of all cosines: -?0\.\d\d",
            *(f"{name}: read back, the same numbers" for name in ("clip", "dinov2")),
            *with_torch(*(rf"{n}: in transformers, .* \d\.\de-0[6-9]" for n in ("clip", "dinov2"))),
        ),
    ),
    "02_give": Trial(
        settings=give,
        pictures=tuple(f"out/{name}.png" for name in ("images", "maps")),
        says=(
            r"largest change by fresh adapters: 0\.0e\+00",
            r"\d+ objects \(\d+ pairs\) of 12 classes in 40 images",
            r"present or absent, all: AUC 0\.\d\d, without an instruction 0\.\d\d",
            r"read back: embeddings differ by 0\.0e\+00",
        ),
    ),
    "03_language": Trial(
        settings=language,
        pictures=("out/attention.png",),
        says=(
            r"<\|im_start\|> user\nthe cat sat <\|im_end\|>",
            r"\d tokens, ended by (end|length); sum of log-probabilities -\d",
            *(rf"> {text}\n[^>]*\((\d+) tokens were read\)" for text in ("the cat", "a hat")),
        ),
    ),
    "04_mmvp_mof": Trial(
        settings=pairs,
        pictures=tuple(f"out/{name}.png" for name in ("blind_pairs", "patterns", "answers")),
        says=(
            "36 images",
            r"\d+ pairs above 0\.5 by scenes-clip, [1-9]\d* of them below 0\.99 by scenes-ssl",
            *(rf"{name}: position \d\.\d\d" for name in ("scenes-clip", "scenes-ssl")),
            r"CLIP and SSL: \d+\.\d% of 18 pairs, chance 25%",
        ),
    ),
}
"""By name; a new notebook adds its own."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell: "code" or "markdown", its text and its tags."""

    kind: str
    text: str
    tags: tuple[str, ...] = ()


def percent_cells(text: str) -> Iterator[Cell]:
    """The cells of a script in jupytext's percent format."""
    blocks: list[tuple[re.Match[str], list[str]]] = []
    for line in _HEADER.sub("", text).splitlines():
        if mark := _MARK.match(line):
            blocks.append((mark, []))
        elif blocks:
            blocks[-1][1].append(line)
        else:
            assert not line.strip(), f"before the first cell: {line}"
    for mark, lines in blocks:
        options = {key: json.loads(value) for key, value in _OPTION.findall(mark["options"])}
        kind = mark["kind"] or "code"
        if kind == "markdown":
            assert all(line[:2] in ("# ", "#", "") for line in lines), lines
            lines = [line[2:] for line in lines]
        yield Cell(kind, "\n".join(lines).strip("\n"), tuple(options.get("tags", ())))


def notebook_cells(notebook: Mapping[str, Any]) -> Iterator[Cell]:
    """The cells of a parsed .ipynb."""
    for cell in notebook["cells"]:
        tags = tuple(cell["metadata"].get("tags", ()))
        yield Cell(cell["cell_type"], "".join(cell["source"]), tags)


def check_format(notebook: Mapping[str, Any]) -> None:
    """Fails unless it is nbformat 4.5 without anything that a run leaves behind."""
    assert notebook.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook["metadata"]["kernelspec"] == kernel
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert all(isinstance(line, str) for line in cell["source"])
        assert set(cell["metadata"]) <= {"tags", "lines_to_next_cell"}
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            keys |= {"outputs", "execution_count"}
        else:
            assert cell["cell_type"] == "markdown"
        assert cell.keys() == keys


def script(cells: Iterator[Cell], settings: Mapping[str, Any]) -> str:
    """The code of all cells, with other settings behind those of the cell tagged "parameters"."""
    parts, given = [], 0
    for cell in cells:
        parts += [cell.text] if cell.kind == "code" else []
        if "parameters" in cell.tags:
            unknown = [name for name in settings if not re.search(rf"^{name} = ", cell.text, re.M)]
            assert not unknown, f"the parameters cell does not set {unknown}"
            parts += [f"{name} = {value!r}" for name, value in settings.items()]
            given += 1
    assert given == 1, f'{given} cells are tagged "parameters", expected one'
    return "\n".join(parts)


def test_every_notebook_is_a_pair_and_is_tried():
    assert {file.stem for file in FOLDER.glob("*.py")} == set(TRIALS)
    assert {file.stem for file in FOLDER.glob("*.ipynb")} == set(TRIALS)


SLOW = ("02_give",)
"""Run by `make test-slow` alone: `make test` trains GiVE in test_give_programs.py."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TRIALS]
)
def test_notebook_runs(name, tmp_path):
    trial = TRIALS[name]
    cells = percent_cells((FOLDER / f"{name}.py").read_text())
    # The slow ones compile as users do, and print the numbers that users see.
    flags = {"XLA_FLAGS": ""} if name in SLOW else {}
    done = subprocess.run(
        [sys.executable, "-c", script(cells, trial.settings(tmp_path))],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", **flags},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{name}\n{done.stdout}\n{done.stderr}"
    for pattern in trial.says:
        assert re.search(pattern, done.stdout), f"{pattern} is not in\n{done.stdout}"
    for picture in trial.pictures:
        with PIL.Image.open(tmp_path / picture) as image:
            assert min(image.size) > 100
            low, high = image.convert("L").getextrema()
            assert high - low > 100
    assert not (tmp_path / "runs").exists(), "something ignores the folder in the settings"


@pytest.mark.parametrize("name", TRIALS)
def test_both_files_say_the_same(name):
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    check_format(notebook)
    ours = list(percent_cells((FOLDER / f"{name}.py").read_text()))
    theirs = list(notebook_cells(notebook))
    assert len(ours) == len(theirs), _SYNC
    for one, other in zip(ours, theirs, strict=True):
        assert one == other, _SYNC


SCRIPT = """\
# ---
# jupyter:
# ---

# %% [markdown]
# # Title
#
# A word.

# %% tags=["parameters"]
SIZE = 1


# %%
def double(size):
    return 2 * size


print(double(SIZE))
"""


def test_cells_are_read_and_settings_replaced(capsys):
    cells = list(percent_cells(SCRIPT))
    assert cells == [
        Cell("markdown", "# Title\n\nA word."),
        Cell("code", "SIZE = 1", ("parameters",)),
        Cell("code", "def double(size):\n    return 2 * size\n\n\nprint(double(SIZE))"),
    ]
    exec(script(iter(cells), {"SIZE": 21}), {})
    assert capsys.readouterr().out == "42\n"
    with pytest.raises(AssertionError, match="does not set \\['SIZES'\\]"):
        script(iter(cells), {"SIZES": 21})
    with pytest.raises(AssertionError, match="expected one"):
        script(iter(cells[2:]), {})


@pytest.mark.parametrize("change", [{"outputs": [{}]}, {"execution_count": 1}, {"id": "a b"}])
def test_what_a_run_leaves_behind_is_noticed(change):
    name = next(iter(TRIALS))
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    code = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    code.update(change)
    with pytest.raises(AssertionError):
        check_format(notebook)
