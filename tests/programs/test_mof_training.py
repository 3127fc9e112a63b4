"""Train a LLaVA in two stages through the programs: data of LLaVA's format, results, errors."""

from __future__ import annotations

import json

import jax
import ml_collections
import numpy as np
import PIL.Image
import pytest

import perception_jax
from launch import check_data, common, evaluate, systems, train
from perception_jax.api.multimodal import load_llava_lora
from perception_jax.interop.checkpoint_dir import open_checkpoint
from perception_jax.models.params import flatten
from perception_jax.testing import tiny_llama
from perception_jax.train.state import abstract_model
from tests.tiny_chats import Chats

PRETRAIN = "--config=configs/mof/llava15_pretrain_imof.py:samples=24"
FINETUNE = "--config=configs/mof/llava15_finetune_imof.py:batch=128,samples=24"
SMALL = [
    *("--config.division.rows=4", "--config.division.devices=2", "--config.train.batch_size=8"),
    *("--config.division.accumulate=1", "--config.train.steps=3"),
    "--config.train.optim.warmup_steps=1",
    *("--config.train.compute_dtype=float32", "--config.train.frozen_dtype=float32"),
    *("--config.data.max_length=200", "--config.data.lengths=(256,)", "--config.data.workers=0"),
    *("--config.evaluation.batch_size=8", "--config.data.test_every=6", "--config.chunk=64"),
]


def run(program, module, *words) -> int:
    return common.main(program, module.run, [*words])


def results(folder) -> dict[str, float]:
    return json.loads((folder / "results.json").read_text())


def row(record, folder) -> dict:
    """A record as LLaVA has it, with its image in a folder of its own."""
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn.role], "value": turn.text} for turn in record.conversation]
    if not record.images:
        return {"id": record.id, "conversations": turns}
    path = f"coco/{record.id}.png"
    (folder / "coco").mkdir(exist_ok=True)
    PIL.Image.fromarray(record.image).save(folder / path)
    return {"id": record.id, "image": path, "conversations": turns}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model and two lists of conversations, with one image that cannot be read."""
    folder = tmp_path_factory.mktemp("mof")
    perception_jax.export(tiny_llama.loaded(chat=False), folder / "language")
    rows = [row(record, folder) for record in Chats.made(24).records]
    captions = [one for one in rows if "image" in one]
    (folder / "coco/chat8.png").write_bytes(b"no image")
    (folder / "mix.json").write_text(json.dumps(rows))
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


def words(config: str, folder, data: str, towers: str, *more: str) -> list[str]:
    return [
        config,
        *SMALL,
        f"--config.model.language={folder / 'language'}",
        f"--config.model.towers={towers}",
        f"--config.data.source={folder / data}",
        f"--config.data.images={folder}",
        "--config.data.max_bad_fraction=0.2",
        *more,
    ]


TWO = "('scenes-clip', 'scenes-clip')"
ONE = "('scenes-clip',)"


@pytest.fixture(scope="module")
def stage1(folder):
    asked = words(PRETRAIN, folder, "captions.json", TWO)
    assert run(train.PROGRAM, train, *asked, f"--workdir={folder / 'stage1'}") == 0
    return folder / "stage1"


@pytest.fixture(scope="module")
def stage2(folder, stage1):
    asked = words(FINETUNE, folder, "mix.json", TWO, f"--config.projectors={stage1}/projectors")
    assert run(train.PROGRAM, train, *asked, f"--workdir={folder / 'stage2'}") == 0
    return asked, folder / "stage2"


def base_of(asked: list[str]):
    config = common.parse([*asked, "--workdir=x"], train.PROGRAM).config
    return systems.training_program(config).task(config).base


def leaves_of(base, prefix: str) -> dict[str, np.ndarray]:
    leaves = flatten(base.model)
    shapes = {
        path: jax.ShapeDtypeStruct(leaf.shape, np.float32)
        for path, leaf in leaves.items()
        if path.startswith(prefix)
    }
    return {path.removeprefix(prefix): np.asarray(x) for path, x in base.read(shapes).items()}


def test_stage_1_writes_projectors_under_the_authors_names(stage1, folder):
    names = set(open_checkpoint(stage1 / "projectors/mm_projector.safetensors"))
    parts = [f"{k}.{leaf}" for k in (0, 2) for leaf in ("weight", "bias")]
    assert names == {f"model.{one}mm_projector.{part}" for one in ("", "dino_") for part in parts}
    assert 1 < results(stage1)["held_out/loss"] < 10
    fresh = leaves_of(base_of(words(PRETRAIN, folder, "captions.json", TWO)), "projector/")
    trained = open_checkpoint(stage1 / "projectors/mm_projector.safetensors")
    moved = trained["model.mm_projector.0.weight"].T - fresh["fc1/kernel"]
    assert 0 < np.abs(moved).max() < 0.02  # lr 1e-3, three updates, the first at 0


def test_stage_2_starts_with_the_projectors_of_stage_1(stage1, stage2):
    asked, _ = stage2
    trained = open_checkpoint(stage1 / "projectors/mm_projector.safetensors")
    first, second = (trained[f"model.{k}mm_projector.2.weight"].T for k in ("", "dino_"))
    assert not np.array_equal(first, second)
    base = base_of(asked)
    np.testing.assert_array_equal(leaves_of(base, "projector/")["fc2/kernel"], first)
    np.testing.assert_array_equal(leaves_of(base, "second_projector/")["fc2/kernel"], second)
    # As MoF's code: the second one in both places.
    base = base_of([*asked, "--config.reference_adapter_collision=True"])
    np.testing.assert_array_equal(leaves_of(base, "projector/")["fc2/kernel"], second)
    np.testing.assert_array_equal(leaves_of(base, "second_projector/")["fc2/kernel"], second)


def test_stage_2_writes_a_whole_model_that_evaluates_as_the_run(stage2, tmp_path):
    asked, workdir = stage2
    loaded = perception_jax.load(workdir / "llava")
    assert loaded.config.mixing == "interleaved"
    assert loaded.config.tokens_per_image == 32
    before = base_of(asked)
    for part, moves in (("vision/", False), ("second_vision/", False), ("language/", True)):
        own, old = flatten(loaded.model), leaves_of(before, part)
        same = all(np.array_equal(own[part + path], leaf) for path, leaf in old.items())
        assert same != moves, part
    for source in (workdir, workdir / "llava"):
        out = tmp_path / source.name
        told = [*asked, f"--checkpoint={source}", f"--out={out}"]
        assert run(evaluate.PROGRAM, evaluate, *told) == 0
        assert results(out) == pytest.approx(results(workdir), rel=1e-5)
    assert "Test conversations: 4 conversations" in (workdir / "report.html").read_text()


@pytest.fixture(scope="module")
def adapted(folder, stage1):
    config = "--config=configs/mof/llava15_finetune_clip.py:lora,samples=24"
    asked = words(config, folder, "mix.json", ONE, f"--config.projectors={stage1}/projectors")
    asked += ["--config.lora.rank=2", "--config.train.optim.learning_rate=0.01"]
    assert run(train.PROGRAM, train, *asked, f"--workdir={folder / 'lora'}") == 0
    return asked, folder / "lora"


def test_lora_and_projector_are_written_under_the_authors_names(adapted, folder):
    _, workdir = adapted
    names = set(open_checkpoint(workdir / "lora/adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    loaded = load_llava_lora(workdir / "lora", base=folder / "language", tower="scenes-clip")
    assert loaded.config.mixing == "single"


def test_evaluate_takes_a_folder_of_lora(adapted, tmp_path):
    asked, workdir = adapted
    told = [*asked, f"--checkpoint={workdir / 'lora'}", f"--out={tmp_path}"]
    assert run(evaluate.PROGRAM, evaluate, *told) == 0
    assert results(tmp_path) == pytest.approx(results(workdir), rel=1e-4)


def test_check_data_shows_conversations_and_names_what_cannot_be_used(folder, tmp_path, capsys):
    asked = words(FINETUNE, folder, "mix.json", TWO, f"--out={tmp_path / 'page.html'}")
    assert run(check_data.PROGRAM, check_data, *asked, "--count=24") == 0
    page = (tmp_path / "page.html").read_text()
    answer = Chats.made(24).records[0].conversation[1].text
    assert f"{answer}" in page
    assert "image 0, 48×48" in page
    assert "8:chat8" in capsys.readouterr().out + page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--config.train.batch_size=16"], "train.batch_size: expected 8"),
        (["--config.projectors=/nowhere"], "projectors: expected a folder or file of stage 1"),
        (["--config.data.template=vicuna"], "the name of a template, found 'vicuna'"),
        (["--config.model.whole=x"], "model: expected a whole LLaVA"),
        (["--config.data.max_length=300"], "lengths: expected the last to be at least 331"),
        (["--config.model.towers=('scenes-clip',)"], "takes 2 image tower"),
        (["--config.train.optim.accumulate=4"], "micro-batches of whole devices"),
    ],
)
def test_settings_that_do_not_fit_are_one_clear_error(folder, tmp_path, capsys, changes, message):
    asked = words(FINETUNE, folder, "mix.json", TWO, *changes)
    assert run(train.PROGRAM, train, *asked, f"--workdir={tmp_path}") == 1
    assert message in capsys.readouterr().err


def test_a_language_model_may_be_drawn():
    """The tower is read, the rest has the task's own initial values."""
    words = ["--config=configs/mof/forkme.py:runlocal", "--workdir=x"]
    config = common.parse(words, train.PROGRAM).config
    task = systems.training_program(config).task(config)
    model = abstract_model(task)
    leaves = {**model.trainable, **model.frozen}
    read = task.pretrained(leaves)
    assert set(read) == {path for path in leaves if path.startswith("vision/")}
    clip = flatten(perception_jax.load("scenes-clip").model)
    for path, leaf in read.items():
        np.testing.assert_array_equal(leaf, clip[path])


RECIPES = {
    "llava15_pretrain_clip": ((256, 336), 576, 20_979_712, 2181),
    "llava15_pretrain_amof": ((256, 224), 256, 31_467_520, 2326),
    "llava15_pretrain_imof": ((256, 336), 1152, 62_935_040, 2326),
    "llava15_finetune_clip": ((128, 336), 576, 6_759_395_328, 5198),
    "llava15_finetune_clip:lora": ((128, 336), 576, 340_795_392, 5198),
    "llava15_finetune_amof": ((128, 224), 256, 13_047_331_840, 5198),
    "llava15_finetune_imof": ((176, 336), 1152, 13_078_799_360, 3780),
    "forkme": ((8, 336), 576, 340_795_392, 21),
}


@pytest.mark.parametrize("name", RECIPES)
def test_published_recipes_are_planned_without_weights(name):
    (rows, side), tokens, trained, steps = RECIPES[name]
    path, _, argument = name.partition(":")
    config, _ = common.load_config(f"configs/mof/{path}.py:{argument}")
    assert config.train.steps == steps
    assert config.train.optim.warmup_steps == -(-steps * 3 // 100)
    rates = {2e-4: 0.1}.get(config.train.optim.learning_rate)  # of the projectors beside LoRA
    assert (config.trains == "lora") == (rates is not None)
    if rates:
        pattern, multiplier, _ = config.train.optim.rules[0]
        assert (pattern, multiplier) == ("projector/", pytest.approx(rates))
    config = ml_collections.ConfigDict(json.loads(config.to_json_best_effort()))
    task, batches = systems.planning_program(config).shapes(config)
    assert task.base.config.tokens_per_image == tokens
    assert batches[-1]["ids"].shape[0] == rows
    assert batches[0]["image"].shape == (rows, 1, side, side, 3)
    assert batches[-1]["ids"].shape[1] >= 2048 + tokens - 1
    assert ("image" in batches[-1]) == (config.data.order != "modality")
    leaves = abstract_model(task).trainable.values()
    assert sum(leaf.size for leaf in leaves) == trained
