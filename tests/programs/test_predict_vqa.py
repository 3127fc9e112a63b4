"""`launch.predict vqa`, and `chat` with images, on a tiny LLaVA of random weights."""

from __future__ import annotations

import dataclasses
import io
import json

import jax
import numpy as np
import PIL.Image
import pytest
from flax import nnx

import perception_jax
from launch import common, predict
from perception_jax import api
from perception_jax.errors import ConfigError, DataError
from perception_jax.generate import IMAGE, Generator, Sampling
from perception_jax.models.llava import Llava
from perception_jax.models.params import flatten, unflatten
from perception_jax.nn.taps import Taps
from perception_jax.systems.text import Chat, TextModel, read_questions
from perception_jax.systems.text.chat import HELP, IMAGE_HELP
from perception_jax.testing import tiny_llama, tiny_llava
from tests.arrays import drawn

QUESTIONS = ("the cat sat", "a hat")
TOKENS = 6


@pytest.fixture(scope="module")
def loaded():
    """A tiny I-MoF with large weights, so that answers neither repeat a token nor are all alike."""
    made = tiny_llava.loaded(tiny_llava.IMOF, context=512)
    model = drawn(lambda: Llava(made.config, rngs=nnx.Rngs(params=0)))
    params = flatten(model)
    kernels = (p for p in params if p.startswith("language/blocks/") and p.endswith("kernel"))
    model = unflatten(model, params | {path: 4 * params[path] for path in kernels})
    return dataclasses.replace(made, model=model)


@pytest.fixture(scope="module")
def folder(loaded, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "llava"
    api.export(loaded, path, layout="reference")
    return path


@pytest.fixture(scope="module")
def model(folder):
    return TextModel(perception_jax.load(folder))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, size in (("a", (40, 60)), ("b", (33, 20))):
        PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path / f"{name}.png")
    return path


def prompt_of(loaded, question):
    """The authors' prompt, tokenized in the passages before and behind the image."""
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions."
    )
    words = loaded.processor.tokenizer
    texts = (f"{system} USER: ", f"\n{question} ASSISTANT:")
    before, behind = (words(text).tolist() for text in texts)
    return [*before, *[IMAGE] * loaded.config.tokens_per_image, *behind[1:]]


def pixels_of(loaded, path):
    return np.asarray(loaded.processor.images([path]))[None]


@pytest.fixture(scope="module")
def expected(loaded, pictures):
    """What the generator gives for each question about each picture alone."""
    generator = Generator(loaded.model, chunk=4)
    encode = jax.jit(lambda m, x: m.image_tokens(x))
    return {
        (name, question): generator.generate(
            [prompt_of(loaded, question)],
            image_tokens=encode(loaded.model, pixels_of(loaded, pictures / f"{name}.png")),
            tokens=TOKENS,
            sampling=Sampling(end_ids=(2, 275)),
        )[0]
        for name in "ab"
        for question in QUESTIONS
    }


def run(command, *words):
    return common.main(predict.PROGRAM, predict.run, [command, *map(str, words)])


def test_answers_and_attention_of_a_folder(folder, loaded, pictures, expected, tmp_path, capsys):
    (pictures / "damaged.png").write_bytes(b"\x89PNG")
    words = [f"--question={one}" for one in QUESTIONS]
    command = (f"--model={folder}", f"--image={pictures}", *words, f"--tokens={TOKENS}")
    assert run("vqa", *command, "--layer=1", f"--out={tmp_path}") == 0
    (pictures / "damaged.png").unlink()
    assert "pictures and JSON of 2 images, 1 skipped" in capsys.readouterr().out
    decode = loaded.processor.tokenizer.decode
    for name in "ab":
        facts = json.loads((tmp_path / f"{name}.json").read_text())
        for question, answer in zip(QUESTIONS, facts["answers"], strict=True):
            wanted = expected[name, question]
            assert answer["question"] == question
            assert tuple(answer["ids"]) == wanted.ids
            assert answer["answer"] == decode(wanted.ids)
            np.testing.assert_allclose(answer["log_probs"], wanted.log_probs, atol=1e-3)
        assert (facts["layer"], facts["tokens"]) == (1, TOKENS)
        assert facts["template"]["user"] == "USER: "
        picture = np.asarray(PIL.Image.open(tmp_path / f"{name}.png"))
        assert picture.shape[1] > 3 * 288
    # The attention is that of the rows at which the tokens were chosen, to both towers' tokens.
    found = facts["answers"][0]
    prompt = prompt_of(loaded, QUESTIONS[0])
    ids = np.array([[*prompt, *found["ids"][:-1]]], np.int32)
    images, taps = pixels_of(loaded, pictures / "b.png"), Taps(attention=(1,))
    run_whole = jax.jit(lambda m: m(ids, None, images, taps=taps, head=False).attention)
    start = prompt.index(IMAGE)
    rows = np.asarray(run_whole(loaded.model))[0, 0].mean(axis=0)[len(prompt) - 1 :]
    wanted = rows[:, start : start + 18].mean(axis=0).reshape(9, 2).sum(axis=1).reshape(3, 3)
    np.testing.assert_allclose(found["attention"], wanted, atol=1e-4)


def test_a_file_of_questions_is_answered_once(folder, pictures, expected, tmp_path, capsys):
    rows = [{"image": f"{n}.png", "question": q, "id": f"{n}{q[:1]}"} for n, q in expected]
    lines = pictures / "questions.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (f"--model={folder}", f"--questions={lines}", f"--tokens={TOKENS}", "--batch=3")
    for made in (4, 0):
        assert run("vqa", *words, f"--out={tmp_path}") == 0
        assert f"{made} of 4 prompts" in capsys.readouterr().out
    (file,) = tmp_path.glob("predictions-*.jsonl")
    found = [json.loads(row) for row in file.read_text().splitlines()]
    assert [row["prompt"] for row in found] == [question for _, question in expected]
    assert [tuple(row["extras"]["ids"]) for row in found] == [one.ids for one in expected.values()]
    lines.write_text('{"image": "a.png"}\n')
    with pytest.raises(DataError, match=r"questions\.jsonl:1.*question"):
        read_questions(lines)


def test_images_are_made_square_as_asked(folder, loaded, pictures, tmp_path):
    (question,) = QUESTIONS[:1]
    words = (f"--question={question}", f"--tokens={TOKENS}", "--image_mode=squash")
    image = f"--image={pictures / 'a.png'}"
    assert run("vqa", f"--model={folder}", image, *words, f"--out={tmp_path}") == 0
    facts = json.loads((tmp_path / "a.json").read_text())
    assert facts["image_mode"] == "squash"
    other = loaded.at_size(loaded.processor.image.size, mode="squash")
    pixels = pixels_of(other, pictures / "a.png")
    assert np.abs(pixels - pixels_of(loaded, pictures / "a.png")).max() > 0.1
    (wanted,) = Generator(loaded.model, chunk=4).generate(
        [prompt_of(loaded, question)],
        image_tokens=jax.jit(lambda m, x: m.image_tokens(x))(loaded.model, pixels),
        tokens=TOKENS,
        sampling=Sampling(end_ids=(2, 275)),
    )
    (answer,) = facts["answers"]
    assert tuple(answer["ids"]) == wanted.ids
    np.testing.assert_allclose(answer["log_probs"], wanted.log_probs, atol=1e-3)


def test_the_command_line_says_what_is_missing(folder, pictures, tmp_path, capsys):
    for words, message in (
        ([f"--image={pictures}"], "--image needs --question"),
        (["--question=a"], "image"),
    ):
        assert run("vqa", f"--model={folder}", f"--out={tmp_path}", *words) == 2
        assert message in capsys.readouterr().err


def said(chat, *words):
    return "".join(chat.say(*words))


def test_a_conversation_about_images_keeps_its_cache(model, loaded, pictures):
    """Each answer is that of reading the whole conversation anew."""
    chat = Chat(model, tokens=TOKENS)
    shown, turns = [], []
    for text, names in (("the cat", "a"), ("a hat", ""), ("sat", "b")):
        shown += [pictures / f"{name}.png" for name in names]
        turns.append(model.turn(text, len(names)))
        ids = model.ids(turns)
        assert ids.count(IMAGE) == 18 * len(shown)
        images = model.image_tokens(model.pixels(shown)[None])
        (wanted,) = model.answer([ids], image_tokens=images, tokens=TOKENS)
        assert said(chat, text, [pictures / f"{name}.png" for name in names]) == wanted.text
        assert chat.read == len(ids) if len(turns) == 1 else chat.read < len(ids) - 18
        turns.append(chat.turns[-1])
    assert chat.turns == tuple(turns)


def test_the_terminal_takes_images(monkeypatch, capsys, folder, pictures, expected, model):
    lines = [QUESTIONS[0], "/reset", f"/image {pictures}/b.png", QUESTIONS[1], "/what"]
    lines += [f"/image {pictures}/none.png", "a", "/exit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    image = f"--image={pictures}/a.png"
    assert run("chat", f"--model={folder}", image, f"--tokens={TOKENS}") == 0
    out = capsys.readouterr().out
    texts = []
    for key in (("a", QUESTIONS[0]), ("b", QUESTIONS[1])):
        one = expected[key]
        note = "\n(stopped at --tokens or at the end of the context)\n" * (one.ended == "length")
        texts.append(f"{model.tokenizer.decode(one.ids)}{note}\n")
    assert out.startswith("".join(texts) + f"{HELP}\n{IMAGE_HELP}\n")
    assert "none.png" in out
    assert "The question was not asked." in out


def test_a_model_without_images_says_so(tmp_path):
    text = TextModel(tiny_llama.loaded())
    with pytest.raises(
        ConfigError, match=r"a model that reads images, e\.g\. a LLaVA, found a Llama"
    ):
        text.pixels([tmp_path])
    chat = Chat(text, tokens=4)
    with pytest.raises(ConfigError, match="reads images"):
        said(chat, "a", [tmp_path])
    assert "<image>" in text.template.prompt([text.turn("b", 1)])
