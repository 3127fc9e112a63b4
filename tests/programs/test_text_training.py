"""Train a language model, evaluate the run and its export, through the programs themselves."""

from __future__ import annotations

import json
import math

import jax
import ml_collections
import numpy as np
import pytest

import perception_jax
from launch import check_data, common, evaluate, systems, train
from perception_jax.api import load_lora
from perception_jax.testing import tiny_llama
from perception_jax.train import restore
from perception_jax.train.state import abstract_model
from tests.tiny_text import corpus

CONFIG = "--config=configs/text/finetune.py"
SHORT = ["--config.train.steps=4", "--config.train.log_every=2"]


def lines(folder, count=40):
    """A file of records, one of which cannot be used."""
    entries = []
    for record in corpus(count).records:
        said = [{"role": turn.role, "text": turn.text} for turn in record.conversation]
        entries.append({"id": record.id, **({"conversation": said} if said else {})})
        if record.text:
            entries[-1]["text"] = record.text
    entries.append({"id": "silent", "conversation": [{"role": "user", "text": "the cat"}]})
    path = folder / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    return path


def run(program, module, *words) -> int:
    return common.main(program, module.run, [*words])


def results(folder) -> dict[str, float]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A run from scratch on conversations about scenes."""
    workdir = tmp_path_factory.mktemp("scratch")
    words = [f"{CONFIG}:runlocal", "--config.data.scenes=60", "--config.evaluation.scenes=10"]
    assert run(train.PROGRAM, train, *words, *SHORT, f"--workdir={workdir}") == 0
    return words, workdir


def test_a_run_from_scratch_reports_and_exports(scratch):
    _, workdir = scratch
    found = results(workdir)
    assert set(found) == {
        f"held_out/{name}" for name in ("loss", "perplexity", "accuracy", "tokens")
    }
    assert 1 < found["held_out/perplexity"] < 300
    page = (workdir / "report.html").read_text()
    assert "10 texts of" in page
    assert "Cross-entropy" in page
    loaded = perception_jax.load(workdir / "hf")
    assert loaded.processor.tokenizer.vocab_size == 259
    assert loaded.config.end_ids == (256,)


@pytest.mark.parametrize("kind", ["run", "export"])
def test_evaluate_gives_the_numbers_of_the_run(scratch, tmp_path, kind):
    words, workdir = scratch
    checkpoint = workdir if kind == "run" else workdir / "hf"
    words = [*words, f"--checkpoint={checkpoint}", f"--out={tmp_path}"]
    assert run(evaluate.PROGRAM, evaluate, *words) == 0
    assert results(tmp_path) == pytest.approx(results(workdir), rel=1e-5)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A run of LoRA on a folder, with a file of records."""
    folder = tmp_path_factory.mktemp("lora")
    perception_jax.export(tiny_llama.loaded(), folder / "base")
    words = [
        f"{CONFIG}:lora,length=96,batch=8",
        f"--config.model={folder / 'base'}",
        f"--config.data.source={lines(folder)}",
        "--config.data.max_bad_fraction=0.1",
        "--config.lora.rank=2",
        "--config.train.optim.learning_rate=0.01",
    ]
    assert run(train.PROGRAM, train, *words, *SHORT, f"--workdir={folder / 'run'}") == 0
    return words, folder


def test_lora_reloads_with_the_logits_of_the_run(adapted):
    words, folder = adapted
    assert not (folder / "run" / "hf").exists()
    config = common.parse([*words, f"--workdir={folder}"], train.PROGRAM).config
    task = systems.training_program(config).task(config)
    model, step = restore.load_model(task, folder / "run")
    base = perception_jax.load(folder / "base")
    loaded = load_lora(base, folder / "run" / "lora")
    ids = np.arange(1, 20)[None]
    logits = jax.jit(lambda model: model(ids).logits)
    np.testing.assert_allclose(logits(loaded.model), logits(model), atol=1e-5)
    assert np.abs(logits(loaded.model) - logits(base.model)).max() > 1e-3
    assert step == 4


def test_evaluate_takes_a_folder_of_lora(adapted, tmp_path):
    words, folder = adapted
    words = [*words, f"--checkpoint={folder / 'run' / 'lora'}", f"--out={tmp_path}"]
    assert run(evaluate.PROGRAM, evaluate, *words) == 0
    assert results(tmp_path) == pytest.approx(results(folder / "run"), rel=1e-4)


def test_check_data_shows_what_is_predicted(adapted, tmp_path, capsys):
    words, _ = adapted
    words = [*words, f"--out={tmp_path / 'page.html'}", "--count=41"]
    assert run(check_data.PROGRAM, check_data, *words) == 0
    page = (tmp_path / "page.html").read_text()
    assert "expected something to predict" in page
    answer = next(one for one in corpus(40).records if one.conversation).conversation[1].text
    assert f"“{answer}" in page
    assert "usable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"conversation": [{"role": "gpt", "text": "a"}]}',
            "chats.jsonl:1: conversation[0]: role",
        ),
        (b'{"text": "caf\xe9"}', "chats.jsonl:1: expected UTF-8 text, found the byte 0xE9"),
        (b'{"text": "  "}', "chats.jsonl:1: text: expected a text that is not blank"),
        (b"", "chats.jsonl: expected at least one line, found none"),
        (b'{"text": "a"', "chats.jsonl:1: not JSON"),
    ],
)
def test_a_damaged_file_is_one_clear_error(adapted, tmp_path, capsys, content, message):
    words, _ = adapted
    (tmp_path / "chats.jsonl").write_bytes(content)
    words = [*words, f"--config.data.source={tmp_path / 'chats.jsonl'}"]
    assert run(check_data.PROGRAM, check_data, *words, f"--out={tmp_path / 'x.html'}") == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("argument", "trained"), [("", 6_738_415_616), (":lora", 319_815_680)])
def test_the_steps_of_7b_are_planned_without_weights(argument, trained):
    config, _ = common.load_config(f"configs/text/llama7b.py{argument}")
    config = ml_collections.ConfigDict(json.loads(config.to_json_best_effort()))
    task, (batch,) = systems.planning_program(config).shapes(config)
    assert {leaf.shape for leaf in jax.tree.leaves(batch)} == {(128, 2623)}
    leaves = abstract_model(task).trainable.values()
    assert sum(math.prod(leaf.shape) for leaf in leaves) == trained
