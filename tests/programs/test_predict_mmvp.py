"""`launch.predict blind_pairs`, `mmvp_vlm` and `vqa_score`: results, resuming, clear errors."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from flax import nnx

import perception_jax
from launch import common, predict
from perception_jax.api import Loaded, Processor
from perception_jax.data.images import decode
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.scenes.sample import SceneConfig
from perception_jax.evals.vqa import asking, mmvp
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.dinov2.modeling import Dinov2
from perception_jax.systems.mmvp import program, scenes, scoring
from perception_jax.systems.mmvp.embed import ImageEmbedder
from perception_jax.systems.mmvp.mining import Miner, Thresholds
from perception_jax.systems.mmvp.published import SHORT_PATTERNS
from tests.arrays import drawn

FIRST = "scenes-clip"
LIMITS = ("--above=0.4", "--below=0.9")


def run(*words):
    return common.main(predict.PROGRAM, predict.run, list(map(str, words)))


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    """Programs use all devices of the process; two are enough here."""
    patch = pytest.MonkeyPatch()
    devices = jax.local_devices()[:2]
    patch.setattr(jax, "local_devices", lambda: devices)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Minimal pairs of drawings as MMVP-VLM's and MMVP's files."""
    folder = tmp_path_factory.mktemp("data")
    pairs = scenes.draw_pairs(SceneConfig(canvas=48, split="test"), each=1)
    scenes.write_vlm(folder / "vlm", pairs)
    scenes.write_questions(folder / "mmvp", pairs)
    return folder


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """A DINOv2 with random weights."""
    config = Dinov2Config(
        image_size=32, patch_size=8, width=32, depth=1, heads=4, mlp_dim=64, registers=0
    )
    loaded = Loaded(
        model=drawn(lambda: Dinov2(config, rngs=nnx.Rngs(params=0))),
        config=config,
        processor=Processor(image=ImageProcessor(size=32), tokenizer=None),
    )
    folder = tmp_path_factory.mktemp("dinov2") / "hf"
    perception_jax.export(loaded, folder)
    return folder


@pytest.fixture(scope="module")
def images(data, tmp_path_factory):
    """The drawings, a torn one and a note."""
    folder = tmp_path_factory.mktemp("photos") / "images"
    shutil.copytree(data / "vlm" / "MMVP_VLM_Images", folder)
    whole = (folder / "colour" / "11.jpg").read_bytes()
    (folder / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "note.md").write_text("no image")
    return folder


def pairs_of(out):
    return [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]


def mine(images, second, out, *words):
    return run(
        *("blind_pairs", f"--images={images}", f"--first={FIRST}", f"--second={second}"),
        *(f"--out={out}", *LIMITS, *words),
    )


@pytest.fixture(scope="module")
def mined(images, second, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "pairs"
    assert mine(images, second, out, "--columns=7", "--batch=8") == 0
    return out


def embeddings(out):
    """Those of both encoders, without the image that cannot be read."""
    files = list((out / "embeddings").glob("*/part-00000.npy"))
    found = [np.load(file) for file in files]
    rows = ~np.isnan(found[0]).any(axis=1)
    assert [one.shape[0] for one in found] == [19, 19]
    assert rows.sum() == 18
    # The CLIP's are wider.
    return sorted((one[rows] for one in found), key=lambda one: -one.shape[1])


def test_images_of_scenes_are_minimal_pairs_and_others(tmp_path):
    config = SceneConfig(canvas=32, split="test")
    scenes.write_images(tmp_path, config, each=2, others=3)
    pairs = scenes.draw_pairs(config, each=2)
    expected = {
        f"{pair.pattern}/{k % 2:04d}-{side}.png": record.image
        for k, pair in enumerate(pairs)
        for side, record in zip("ab", pair.records, strict=True)
    }
    found = {str(path.relative_to(tmp_path)): path for path in tmp_path.glob("*/*.png")}
    others = {f"other/{k:04d}.png" for k in range(3)}
    assert found.keys() == expected.keys() | others
    for name, image in expected.items():
        np.testing.assert_array_equal(decode(found[name]), image)
    written = {path: path.stat().st_mtime_ns for path in found.values()}
    scenes.write_images(tmp_path, config, each=2, others=3)  # embeddings are kept by these times
    assert written == {path: path.stat().st_mtime_ns for path in written}


def test_pairs_are_those_of_the_embeddings(mined):
    first, second = embeddings(mined)
    expected = Miner(first, second, Thresholds(above=0.4, below=0.9))()
    found = pairs_of(mined)
    assert list(found[0]) == ["i", "j", "s_clip", "s_dino", "image_i", "image_j"]
    assert [(row["i"], row["j"]) for row in found] == list(
        zip(expected.i.tolist(), expected.j.tolist(), strict=True)
    )
    assert len(found) > 2
    assert found == sorted(found, key=lambda row: (-row["s_clip"], row["s_dino"]))
    assert all(row["image_i"].endswith(".jpg") and "torn" not in row["image_i"] for row in found)


def test_the_sheet_shows_both_images_of_each_pair(mined):
    page = (mined / "pairs.html").read_text()
    found = pairs_of(mined)
    assert page.count("<img") == 2 * len(found)
    assert found[0]["image_i"] in page
    assert f"first {found[0]['s_clip']:.3f}" in page
    assert "images that could not be read" in page


def test_another_threshold_embeds_nothing_again(mined, images, second, monkeypatch, tmp_path):
    out = tmp_path / "pairs"
    shutil.copytree(mined, out)

    def fail(*_):
        raise AssertionError("embedded again")

    monkeypatch.setattr(ImageEmbedder, "__call__", fail)
    assert mine(images, second, out, "--below=0.8") == 0
    assert len(pairs_of(out)) < len(pairs_of(mined))


def test_embeddings_lie_in_parts_and_only_missing_ones_are_made(
    mined, images, second, tmp_path, monkeypatch
):
    monkeypatch.setattr("perception_jax.systems.mmvp.embed.PART", 4)
    out, embedded, embed = tmp_path / "pairs", [], ImageEmbedder.__call__

    def counting(self, pixels):
        embedded.append(len(pixels))
        return embed(self, pixels)

    monkeypatch.setattr(ImageEmbedder, "__call__", counting)
    assert mine(images, second, out, "--batch=8") == 0
    assert embedded == 2 * [4, 4, 4, 4, 2]  # the torn image is in the last part
    numbers = [(row["i"], row["j"]) for row in pairs_of(mined)]
    assert sorted((row["i"], row["j"]) for row in pairs_of(out)) == sorted(numbers)
    parts = sorted((out / "embeddings").glob("*/part-00001.npy"))
    parts[0].unlink()
    parts[1].write_bytes(b"torn")
    embedded.clear()
    assert mine(images, second, out, "--batch=8") == 1  # a damaged part is named
    parts[1].unlink()
    assert mine(images, second, out, "--batch=8") == 0
    assert embedded == [4, 4]


def test_a_search_without_pairs_says_which_threshold_to_change(
    mined, images, second, tmp_path, capsys
):
    out = tmp_path / "pairs"
    shutil.copytree(mined, out)
    for words, message in (
        (("--below=0.1",), "lowest cosine of the second encoder is 0."),
        (("--above=1",), "no cosine of the first encoder is above 1: lower --above"),
    ):
        assert mine(images, second, out, *words) == 0
        assert pairs_of(out) == []
        assert message in capsys.readouterr().out


def test_a_search_that_was_stopped_goes_on_with_the_next_block(
    mined, images, second, monkeypatch, tmp_path
):
    out, searched, search = tmp_path / "pairs", [], Miner.search
    shutil.copytree(mined, out)
    shutil.rmtree(out / "search")
    (out / "pairs.jsonl").unlink()

    def stopping(miner, blocks):
        for block, found in zip(blocks, search(miner, blocks), strict=True):
            searched.append(block.start)
            if len(searched) == 2:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(Miner, "search", stopping)
    assert mine(images, second, out, "--columns=7") == 130
    assert not (out / "pairs.jsonl").exists()
    assert mine(images, second, out, "--columns=7") == 0
    assert searched == [0, 6, 6, 12]
    assert pairs_of(out) == pairs_of(mined)


def test_processes_share_the_work_in_one_folder(mined, images, second, tmp_path, capsys):
    out = tmp_path / "pairs"
    for _ in range(2):  # embeddings first, then blocks
        for share in ("0/2", "1/2"):
            words = ("--columns=7", "--batch=8", f"--share={share}")
            assert mine(images, second, out, *words) == 0
    assert "this process's share is done" in capsys.readouterr().out
    assert pairs_of(out) == pairs_of(mined)


def test_the_processes_of_a_job_wait_for_each_other(mined, images, second, monkeypatch, tmp_path):
    out, waited = tmp_path / "pairs", []
    words = ("--columns=7", "--batch=8")

    def wait():
        waited.append(mine(images, second, out, *words, "--share=1/2"))

    processes = program._processes
    job = ((0, 2), wait)
    monkeypatch.setattr(program, "_processes", lambda share: processes(share) if share else job)
    assert mine(images, second, out, *words) == 0
    assert waited == [0, 0, 0]  # after the embeddings of each encoder, and after the search
    assert pairs_of(out) == pairs_of(mined)
    assert len(list((out / "search").glob("*/*.jsonl"))) == 2


def test_embeddings_come_from_files(mined, tmp_path, capsys):
    first, second = embeddings(mined)
    np.save(tmp_path / "first.npy", first)
    names = [row["image_i"] for row in pairs_of(mined)]
    columns = {"vector": list(second), "path": [f"{k}.jpg" for k in range(len(second))]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "second.parquet")
    words = [f"--first={tmp_path}/first.npy", *LIMITS]
    out = tmp_path / "out"
    assert (
        run("blind_pairs", *words, f"--second={tmp_path}/second.parquet:vector", f"--out={out}")
        == 0
    )
    found, expected = pairs_of(out), pairs_of(mined)
    for key in ("i", "j", "s_clip", "s_dino"):
        assert [row[key] for row in found] == [row[key] for row in expected]
    assert found[0]["image_i"] == f"{found[0]['i']}.jpg" != names[0]
    assert not (out / "pairs.html").exists()
    capsys.readouterr()
    for source, message in (
        ("second.parquet", "there is no column 'embedding'"),
        ("none.npy", "no such file"),
        ("short.npy", "one row for each image"),
        ("flat.npy", "expected a matrix of floating-point numbers"),
        ("nan.npy", "finite non-zero embeddings"),
        ("ragged.parquet", "expected lists of one length"),
        ("texts.parquet:path", "expected lists of floating-point numbers"),
    ):
        np.save(tmp_path / "short.npy", second[:3])
        np.save(tmp_path / "flat.npy", second[0])
        np.save(tmp_path / "nan.npy", second * np.nan)
        ragged = {"embedding": [[1.0, 2.0], [1.0]]}
        pyarrow.parquet.write_table(pyarrow.table(ragged), tmp_path / "ragged.parquet")
        shutil.copy(tmp_path / "second.parquet", tmp_path / "texts.parquet")
        assert run("blind_pairs", *words, f"--second={tmp_path}/{source}", f"--out={out}") == 1
        assert message in capsys.readouterr().err


def test_files_of_other_images_are_refused(mined, images, tmp_path, capsys):
    names = [f"{k}.jpg" for k in range(19)]
    for name, some in (("a", names), ("b", names[::-1])):
        table = pyarrow.table({"embedding": [[1.0, float(k)] for k in range(19)], "path": some})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    words = [f"--{key}={tmp_path}/{k}.parquet" for key, k in (("first", "a"), ("second", "b"))]
    assert run("blind_pairs", *words, f"--out={tmp_path}/out") == 1
    assert "the first other one '18.jpg' instead of '0.jpg'" in capsys.readouterr().err
    assert run("blind_pairs", f"--first={FIRST}", words[1], f"--out={tmp_path}/out") == 1
    assert "an encoder needs --images" in capsys.readouterr().err
    words += [f"--images={images}"]
    assert run("blind_pairs", *words, f"--out={tmp_path}/out") == 1
    assert "expected the embeddings of the same 19 images" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["2/2", "1", "x/3", "-1/2"])
def test_a_share_is_an_index_below_a_number(share, tmp_path, capsys):
    words = ("blind_pairs", f"--out={tmp_path}", f"--share={share}")
    assert run(*words) == 1
    assert "INDEX/COUNT" in capsys.readouterr().err


# --- MMVP-VLM ------------------------------------------------------------------------------------


def test_encoders_are_scored_in_the_papers_layout(data, second, tmp_path, capsys, monkeypatch):
    # The row of the paper that a name means stands below ours, whatever weights it got.
    named = f"openai-l14={perception_jax.api.shipped_folder(FIRST)}"
    words = ("mmvp_vlm", f"--data={data}/vlm", f"--model={FIRST}", f"--out={tmp_path}/out")
    assert run(*words, f"--model={named}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "px", "params", "M", "IN-1k", *SHORT_PATTERNS, "avg"]
    assert lines[1].split()[:4] == [FIRST, "48", "2.0", "–"]
    paper, script, guess = (line.split() for line in lines[3:6])
    assert paper[-3:] == ["6.7", "13.3", "19.3"]
    assert script[:2] == ["authors'", "script"]
    assert script[-1] == "20.0"
    assert guess[0] == "guessing"
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results[FIRST]["pairs"] == 9
    assert len((tmp_path / "out" / FIRST / "output.csv").read_text().splitlines()) == 10

    def fail(*_):
        raise AssertionError("embedded again")

    monkeypatch.setattr(ImageEmbedder, "__call__", fail)
    assert run(*words) == 0
    assert run(*words[:2], f"--model={second}", f"--out={tmp_path}/out") == 1
    assert "a model with an image and a text tower, found Dinov2" in capsys.readouterr().err


def test_scenes_are_drawn_as_the_benchmarks_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scenes, "PAIRS_EACH", 1)
    monkeypatch.setattr(program, "_CANVAS", 48)
    draw = scenes.draw_pairs
    monkeypatch.setattr(scenes, "draw_pairs", lambda config: draw(config, each=1))
    assert run("mmvp_vlm", "--data=scenes", f"--model={FIRST}", f"--out={tmp_path}") == 0
    assert (tmp_path / "scenes" / "Questions.csv").is_file()
    assert FIRST in capsys.readouterr().out


# --- Scores of answers ---------------------------------------------------------------------------


def test_mmvp_is_asked_graded_and_compared(data, tmp_path, capsys):
    root = data / "mmvp"
    questions = mmvp.read_questions(root)
    right = {(str(one.number), one.prompt): one.answer for one in questions}

    def oracle(image, prompt):
        answer = right[image.stem, prompt]
        return answer if int(image.stem) % 4 else "(b)" if answer == "(a)" else "(a)"

    out = tmp_path / "out"
    answers = scoring.run_mmvp(asking.one_by_one(oracle), root, out, model="oracle")
    words = ("vqa_score", "--protocol=mmvp", f"--data={root}", f"--answers={answers}")
    assert run(*words, f"--patterns={root}/patterns.json", f"--out={out}") == 0
    text = capsys.readouterr().out
    assert "oracle (this run)" in text
    assert "GPT-4V" in text
    assert "correlation with CLIP" in text
    found = json.loads((out / "results.json").read_text())
    wrong = sum(int(one.number) % 4 == 0 for one in questions)
    assert found["pair_accuracy"] == pytest.approx(1 - wrong / 9)
    assert found["question_accuracy"] == pytest.approx(1 - wrong / 18)
    assert found["patterns"]["Orientation and Direction"] == 1.0
    requests = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    replies = tmp_path / "replies.jsonl"
    rows = [{"custom_id": one["custom_id"], "reply": "yes"} for one in requests]
    replies.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(*words, f"--replies={replies}", f"--out={out}") == 0
    assert "The accuracy is 1.0" in capsys.readouterr().out
    assert run(*words, "--corrected", f"--out={out}") == 1
    assert "280 rows" in capsys.readouterr().err


def test_pope_textvqa_and_llava_bench_are_scored_from_files(tmp_path, capsys):
    def lines(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    for split in ("random", "popular"):
        labels = [("yes", 1), ("no", 2)]
        rows = [
            {"question_id": k, "image": "x.jpg", "text": "Is it?", "label": label}
            for label, k in labels
        ]
        lines(f"coco_pope_{split}.json", rows)
    answers = [
        {"question_id": f"{split}/{k}", "text": text}
        for split in ("random", "popular")
        for k, text in ((1, "Yes"), (2, "No" if split == "random" else "yes"))
    ]
    words = ("vqa_score", f"--data={tmp_path}", f"--out={tmp_path}/out")
    path = lines("pope.jsonl", answers)
    assert run(*words, "--protocol=pope", f"--answers={path}") == 0
    assert (
        "Category: popular, # samples: 2\nTP\tFP\tTN\tFN\t\n1\t1\t0\t0\n" in capsys.readouterr().out
    )
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["mean_f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert run(*words, "--protocol=pope", f"--answers={lines('p.jsonl', answers[1:])}") == 1
    assert "expected an answer to random/1" in capsys.readouterr().err
    assert run(*words, "--protocol=pope", "--corrected", f"--answers={path}") == 1
    assert "--corrected is of no use for pope" in capsys.readouterr().err

    # LLaVA numbers the questions of all splits, and keeps the split in its questions file.
    kinds = ["popular", "random", "random"]
    rows = [{"question_id": k, "category": kind} for k, kind in enumerate(kinds)]
    lines("llava_pope_test.jsonl", rows)
    path = lines("llava.jsonl", [{"question_id": k, "text": "No"} for k in range(3)])
    assert run(*words, "--protocol=pope", f"--answers={path}") == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["random"]["accuracy"] == 0.5
    assert "popular" not in found  # one id for two questions

    row = {"question_id": 1, "image_id": "a", "question": "Which?", "answers": ["stop"] * 10}
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [row]}))
    path = lines("text.jsonl", [{"question_id": "a", "prompt": "Which?\nAnswer", "text": "Stop"}])
    assert run(*words, "--protocol=textvqa", f"--answers={path}") == 0
    assert "Samples: 1\nAccuracy: 100.00%" in capsys.readouterr().out

    question = {"question_id": 0, "image": "a.jpg", "category": "conv", "text": "What?"}
    lines("questions.jsonl", [question])
    lines("context.jsonl", [{"image": "a.jpg", "caption": "A dog."}])
    path = lines("answers_gpt4.jsonl", [{"question_id": 0, "text": "A dog."}])
    wild = (*words, "--protocol=llava_bench_in_the_wild", f"--answers={path}")
    assert run(*wild) == 0
    assert "1 requests to a judge" in capsys.readouterr().out
    replies = lines("replies.jsonl", [{"custom_id": "0", "reply": "8 6\nBecause."}])
    assert run(*wild, f"--replies={replies}") == 0
    assert "all 75.0" in capsys.readouterr().out
    assert run(*words, "--protocol=llava_bench_coco", f"--answers={path}") == 1
    assert "found no qa90_questions.jsonl" in capsys.readouterr().err


def test_questions_are_written_asked_and_scored_from_predictions(data, tmp_path, capsys):
    root, path = data / "mmvp", tmp_path / "asked" / "questions.jsonl"
    words = ("--protocol=mmvp", f"--data={root}")
    assert run("vqa_questions", *words, f"--out={path}") == 0
    text = capsys.readouterr().out
    assert (
        "--template=llava_v1 --tokens=1024 --temperature=0.2 --top_k=50 --image_mode=hf_crop"
        in text
    )
    assert "--template=llava_v1 --tokens=1024 --temperature=0 --image_mode=hf_crop\n" in text
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["id"] for row in rows] == [str(k) for k in range(1, 19)]
    assert (path.parent / rows[4]["image"]).resolve() == (root / "MMVP Images" / "5.jpg").resolve()
    questions = [
        asking.BenchmarkQuestion(
            id=row["id"], image=path.parent / row["image"], prompt=row["question"]
        )
        for row in rows
    ]
    answers = tmp_path / "answers"
    asking.ask(questions, asking.one_by_one(lambda image, prompt: "(a)"), answers, model="always")
    out = tmp_path / "out"
    assert run("vqa_score", *words, f"--answers={answers}", f"--out={out}") == 0
    assert "always (this run)" in capsys.readouterr().out
    found = json.loads((out / "results.json").read_text())
    assert (found["pair_accuracy"], found["question_accuracy"]) == (0.0, 0.5)
    assert json.loads((out / "answers.jsonl").read_text().splitlines()[0])["model_id"] == "always"
    for wrong, message in (
        (("--protocol=mmvp", "--images=x"), "--images is of no use for mmvp"),
        (("--protocol=pope",), "--images is required for pope"),
        (("--protocol=pope", "--images=x", "--ocr"), "--ocr is of no use for pope"),
        (("--protocol=pope", "--images=x"), "expected coco_pope_random.json or another split"),
    ):
        assert run("vqa_questions", f"--data={root}", *wrong, f"--out={path}") == 1
        assert message in capsys.readouterr().err
