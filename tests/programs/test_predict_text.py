"""`launch.predict text` and `chat`, and what is behind them, on a tiny model of random weights."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import perception_jax
from launch import common, predict
from perception_jax import api
from perception_jax.data.conversation import TEMPLATES
from perception_jax.data.records import Turn
from perception_jax.errors import ConfigError
from perception_jax.generate import Generator, Sampling
from perception_jax.models.llama import Llama
from perception_jax.models.params import flatten, unflatten
from perception_jax.nn import lora, quantize_linear, stack
from perception_jax.nn.taps import Taps
from perception_jax.systems.text import Chat, TextModel, prompt_attention
from perception_jax.systems.text import model as text_model
from perception_jax.systems.text.chat import HELP
from perception_jax.testing import tiny_llama
from tests.arrays import drawn

CHATML = TEMPLATES["chatml"].with_system("")
PROMPTS = ("the cat sat", "a hat", "that cat chases the heat")
TOKENS = 12


@pytest.fixture(scope="module")
def loaded():
    """A tiny model with large weights, so that texts neither repeat a token nor copy the prompt."""
    made = tiny_llama.loaded(context=128)
    model = drawn(lambda: Llama(made.config, rngs=nnx.Rngs(params=0)))
    params = flatten(model)
    kernels = (path for path in params if path.startswith("blocks/") and path.endswith("kernel"))
    model = unflatten(model, params | {path: 4 * params[path] for path in kernels})
    return dataclasses.replace(made, model=model)


@pytest.fixture(scope="module")
def folder(loaded, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "hf"
    perception_jax.export(loaded, path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return TextModel(perception_jax.load(folder))


@pytest.fixture(scope="module")
def expected(loaded, model):
    """What the generator gives for each prompt alone, from the stacked model."""
    generator = Generator(loaded.model, chunk=4)
    ends = Sampling(end_ids=(2, 275))
    ids = [
        loaded.processor.tokenizer(f"<|im_start|>user\n{one}<|im_end|>\n<|im_start|>assistant\n")
        for one in PROMPTS
    ]
    return [generator.generate([one], tokens=TOKENS, sampling=ends)[0] for one in ids]


def run(command, *words):
    return common.main(predict.PROGRAM, predict.run, [command, *map(str, words)])


def failure(capsys, code, command, *words):
    """What a command fails with: one line, or two of a wrong command line."""
    assert run(command, *words) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == code
    return lines[0]


# --- Loading and exporting ------------------------------------------------------------------------


def test_a_language_model_brings_its_tokenizer_and_exports_it(loaded, folder):
    found = perception_jax.load(folder)
    tokenizer = found.processor.tokenizer
    assert tokenizer("the cat").tolist() == [1, 264, 267, 263, 261]
    assert (tokenizer.mode, tokenizer.end_ids) == ("slow_legacy", (2, 275))
    ours = loaded.processor.tokenizer
    for name in ours.files.keys() - {"tokenizer_config.json"}:
        assert (folder / name).read_bytes() == ours.files[name]
    assert found.report.read["tokenizer"] == "LanguageTokenizer"
    assert api.describe(folder)[1].tokenizer.files == tokenizer.files
    assert text_model.sampling_of(found).end_ids == (2, 275)
    with pytest.raises(ConfigError, match=r"use processor\.tokenizer\(text\)"):
        found.processor.texts("the cat")


def test_a_chat_template_may_be_a_file_of_its_own_or_one_of_several(folder, tmp_path):
    plain = tiny_llama.tokenizer(chat=False)
    assert plain.chat_template is None
    jinja = tiny_llama.tokenizer().chat_template
    plain.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(jinja)
    shutil.copy(folder / "model.safetensors", tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    assert perception_jax.load(tmp_path).processor.tokenizer.chat_template == jinja
    several = [{"name": "tool", "template": ""}, {"name": "default", "template": jinja}]
    settings = json.dumps({"chat_template": several}).encode()
    files = {**plain.files, "tokenizer_config.json": settings}
    assert dataclasses.replace(plain, files=files).chat_template == jinja


@pytest.mark.parametrize("kind", ["none", "foreign"])
def test_a_folder_without_a_supported_tokenizer_still_loads(kind, folder, tmp_path, capsys):
    for name in ("model.safetensors", "config.json"):
        shutil.copy(folder / name, tmp_path)
    if kind == "foreign":
        words = {"type": "WordPiece", "unk_token": "a", "vocab": {"a": 0}}
        (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": words}))
    assert perception_jax.load(tmp_path).processor.tokenizer is None
    line = failure(capsys, 1, "text", f"--model={tmp_path}", "--prompt=a")
    assert "expected a tokenizer (tokenizer.json or tokenizer.model" in line


# --- text -----------------------------------------------------------------------------------------


def test_one_prompt_is_streamed_and_saved(folder, expected, loaded, tmp_path, capsys):
    words = (f"--model={folder}", f"--prompt={PROMPTS[0]}", f"--tokens={TOKENS}")
    assert run("text", *words, f"--out={tmp_path}") == 0
    content = json.loads((tmp_path / "text.json").read_text())
    (answer,) = content["answers"]
    assert answer["prompt"] == PROMPTS[0]
    assert answer["ids"] == list(expected[0].ids)
    np.testing.assert_allclose(answer["log_probs"], expected[0].log_probs, atol=1e-4)
    assert answer["ended"] == expected[0].ended
    assert answer["text"] == loaded.processor.tokenizer.decode(expected[0].ids)
    assert content["sampling"]["end_ids"] == [2, 275]
    output = capsys.readouterr()
    assert output.out == answer["text"] + "\n"
    assert f"{len(answer['prompt_ids'])} and {len(answer['ids'])} tokens" in output.err


def test_several_prompts_are_one_batch(folder, expected, tmp_path, capsys):
    words = [f"--prompt={one}" for one in PROMPTS]
    assert run("text", f"--model={folder}", *words, f"--tokens={TOKENS}", f"--out={tmp_path}") == 0
    answers = json.loads((tmp_path / "text.json").read_text())["answers"]
    assert [tuple(one["ids"]) for one in answers] == [one.ids for one in expected]
    assert f"--- {PROMPTS[1]}\n{answers[1]['text']}\n" in capsys.readouterr().out


def test_a_file_of_prompts_is_answered_once(folder, expected, tmp_path, capsys):
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("".join(json.dumps({"prompt": p, "id": p[:3]}) + "\n" for p in PROMPTS))
    words = (f"--model={folder}", f"--prompts={lines}", f"--tokens={TOKENS}", "--batch=2")
    out = tmp_path / "out"
    for made in (3, 0):
        assert run("text", *words, f"--out={out}") == 0
        assert f"{made} of 3 prompts" in capsys.readouterr().out
    (file,) = out.glob("predictions-*.jsonl")
    rows = [json.loads(row) for row in file.read_text().splitlines()]
    assert [(row["id"], row["prompt"]) for row in rows] == [(p[:3], p) for p in PROMPTS]
    assert [tuple(row["extras"]["ids"]) for row in rows] == [one.ids for one in expected]
    line = failure(capsys, 1, "text", *words, f"--out={out}", "--temperature=0.5")
    assert "Give another folder" in line


def test_drawn_texts_depend_on_seed_and_place_but_not_on_the_batch(folder, tmp_path, capsys):
    lines = tmp_path / "prompts.txt"
    lines.write_text("\n\n".join([PROMPTS[0]] * 3))

    def drawn_texts(*more):
        words = (f"--model={folder}", f"--tokens={TOKENS}", "--temperature=1.5", "--top_k=200")
        assert run("text", *words, "--top_p=0.99", "--repetition_penalty=1.1", *more) == 0
        return capsys.readouterr().out

    one = drawn_texts(f"--prompts={lines}", "--seed=3", "--batch=2")
    assert one == drawn_texts(f"--prompts={lines}", "--seed=3", "--batch=3")
    assert one != drawn_texts(f"--prompts={lines}", "--seed=4", "--batch=3")
    texts = one.split(f"--- {PROMPTS[0]}\n")[1:]
    assert len(set(texts)) == 3
    first = drawn_texts(f"--prompt={PROMPTS[0]}", "--seed=3")
    assert texts[0] == first


def test_stop_strings_and_templates(folder, loaded, model, expected):
    answer = expected[0]
    whole = loaded.processor.tokenizer.decode(answer.ids)
    middle = whole[len(whole) // 2 : len(whole) // 2 + 2]
    one = TextModel(perception_jax.load(folder), stop=(middle,))
    ids = one.prompt_ids(PROMPTS[0])
    writing = one.write(one.generator.prefill([ids]).state, tokens=TOKENS)
    pieces = list(writing)
    assert "".join(pieces) == writing.generated().text == whole[: whole.index(middle)]
    assert writing.generated().ended == "stop"
    batch = one.answer([ids], tokens=TOKENS)[0]
    assert batch.text == writing.text
    v0 = TextModel(perception_jax.load(folder), template="llava_v0", system="Short.")
    assert v0.stop.strings == ("###",)
    prompt = v0.template.prompt([Turn(role="user", text="a")], answer=True)
    assert prompt == "Short.###Human: a###Assistant:"
    vicuna = TextModel(perception_jax.load(folder), template="vicuna_v1", sampling=Sampling())
    assert (vicuna.stop, vicuna.sampling.end_ids) == (None, (2,))
    assert model.template == CHATML


@pytest.mark.parametrize("pieces", [["a#", "#", "#b"], ["a", "##", "c###"], ["a###b"], ["a#", "#"]])
def test_nothing_of_a_stop_string_is_shown(pieces):
    class Pieces:
        def push(self, ids):
            return pieces[ids[0]]

        def close(self):
            return ""

    shown = text_model._Shown(Pieces(), ("###",))
    found = [shown.push([k]) for k in range(len(pieces))]
    whole = "".join(pieces).split("###")[0]
    assert "".join([*found, shown.close()]) == whole
    assert "".join(found) == whole.rstrip("#")


def test_adapters_are_merged_and_kernels_quantized(loaded, folder, tmp_path):
    config = lora.LoraConfig(rank=2, alpha=8.0)
    adapted = lora.add_lora(loaded.model, config, [".*/[qv]_proj"], rngs=nnx.Rngs(params=1))
    leaves = flatten(adapted)
    rng = np.random.default_rng(0)
    trained = {
        path: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        for path, leaf in leaves.items()
        if path.endswith("lora/b")
    }
    adapted = unflatten(adapted, leaves | trained)
    api.save_lora(dataclasses.replace(loaded, model=adapted), tmp_path / "lora")
    words = (f"--model={folder}", f"--prompt={PROMPTS[0]}", f"--tokens={TOKENS}")
    assert run("text", *words, f"--lora={tmp_path}/lora", "--int8", f"--out={tmp_path}") == 0
    answer = json.loads((tmp_path / "text.json").read_text())["answers"][0]
    merged = stack.separate(quantize_linear(lora.merge_lora(adapted)), keep=True)
    wanted = Generator(merged, chunk=4).generate([answer["prompt_ids"]], tokens=TOKENS)[0]
    assert tuple(answer["ids"]) == wanted.ids[: len(answer["ids"])]
    np.testing.assert_allclose(
        answer["log_probs"], wanted.log_probs[: len(answer["ids"])], atol=1e-4
    )


def test_attention_over_the_prompt(folder, loaded, model, tmp_path):
    words = (f"--model={folder}", f"--prompt={PROMPTS[0]}", f"--tokens={TOKENS}", "--layer=1")
    assert run("text", *words, "--attention", f"--out={tmp_path}") == 0
    answer = json.loads((tmp_path / "text.json").read_text())["answers"][0]
    count, ids = len(answer["prompt_ids"]), [*answer["prompt_ids"], *answer["ids"]]
    dense = loaded.model(np.array([ids]), taps=Taps(attention=(1,))).attention
    wanted = np.asarray(dense)[0, 0].mean(axis=0)[count - 1 : -1, :count]
    found = answer["attention"]
    np.testing.assert_allclose(found["rows"], wanted, atol=1e-5)
    assert found["prompt"][:3] == ["<s>", "<|im_start|>", "·"]
    assert "·cat" in found["prompt"]
    assert len(found["answer"]) == len(answer["ids"])
    page = (tmp_path / "attention.html").read_text()
    assert page.count("title=") == (count - 1) * len(answer["ids"])
    assert "&lt;|im_start|&gt;" in page
    with pytest.raises(ConfigError, match="at least one token"):
        prompt_attention(model, answer["prompt_ids"], [])


# --- chat -----------------------------------------------------------------------------------------


def said(chat, text):
    return "".join(chat.say(text))


def afresh(model, turns):
    """The answer to a conversation that is read as a whole."""
    return model.answer([model.ids(turns)], tokens=8)[0]


def test_a_conversation_keeps_its_cache_and_gives_what_reading_all_of_it_gives(model):
    chat = Chat(model, tokens=8)
    turns = []
    for text in ("the cat", "a hat", "sat"):
        turns.append(Turn(role="user", text=text))
        wanted = afresh(model, turns)
        assert said(chat, text) == wanted.text
        assert chat.ended == wanted.ended
        turns.append(Turn(role="assistant", text=wanted.text))
        assert chat.turns == tuple(turns)
        whole = len(model.ids(turns[:-1]))
        assert chat.read == whole if len(turns) == 2 else chat.read < whole - 12
    chat.reset()
    assert said(chat, "the cat") == turns[1].text
    assert chat.turns == tuple(turns[:2])


def test_a_stopped_answer_stays_as_far_as_it_came(model):
    chat = Chat(model, tokens=64)
    pieces = chat.say("the cat")
    begun = next(pieces) + next(pieces)
    pieces.close()
    assert [turn.text for turn in chat.turns] == ["the cat", begun]
    assert chat.ended is None
    turns = [*chat.turns, Turn(role="user", text="a hat")]
    chat._tokens = 8
    assert said(chat, "a hat") == afresh(model, turns).text


def converse(monkeypatch, capsys, folder, lines, *words):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert run("chat", f"--model={folder}", *words) == 0
    return capsys.readouterr().out


def test_the_terminal(monkeypatch, capsys, folder, model):
    lines = ["the cat", "", "/reset", "the cat", "/what", "/exit", "never"]
    out = converse(monkeypatch, capsys, folder, lines, "--tokens=8")
    one = afresh(model, [Turn(role="user", text="the cat")])
    note = "\n(stopped at --tokens or at the end of the context)\n" * (one.ended == "length")
    assert out == 2 * f"{one.text}{note}\n" + f"{HELP}\n"


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_stops_the_answer_and_twice_the_program(presses, monkeypatch, capsys, folder, model):
    stream = Generator.stream

    def interrupted(self, *args, **kwargs):
        for part in stream(self, *args, **kwargs):
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
            yield part

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Generator, "stream", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n/reset\nthe cat\n"))
    code = run("chat", f"--model={folder}", "--tokens=64")
    output = capsys.readouterr()
    assert signal.getsignal(signal.SIGINT) is handler
    if presses == 2:
        assert (code, output.out) == (130, "")
        assert "interrupted" in output.err
        return
    monkeypatch.undo()
    begun = next(Chat(model, tokens=64).say("the cat"))
    assert (code, output.out) == (0, 2 * f"{begun}\n(stopped)\n")


def test_a_full_context_is_one_message_and_the_conversation_stays(monkeypatch, capsys, folder):
    lines = ["the cat", "cat " * 128, "/reset", "the cat"]
    out = converse(monkeypatch, capsys, folder, lines, "--tokens=8")
    assert out.count("conversation: expected fewer tokens than the model's context has, 128") == 1
    answers = out.split("conversation: ")
    assert answers[1].endswith(answers[0])


def test_an_answer_ends_with_the_context(model, monkeypatch):
    chat = Chat(model, tokens=1000)
    monkeypatch.setattr(model, "sampling", Sampling())  # no end tokens
    said(chat, "the cat")
    assert chat.ended == "length"
    assert len(chat._ids) == 128
    with pytest.raises(ConfigError, match="context has, 128"):
        said(chat, "a hat")
    assert len(chat.turns) == 2


# --- Failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        (1, ["--prompt="], "--prompt: expected text, found an empty one"),
        (1, ["--prompt=" + "a " * 200], "--prompt: expected fewer tokens than the model's context"),
        (1, ["--prompt=a", "--template=chatm"], "Did you mean chatml?"),
        (1, ["--prompts=nowhere.txt"], "nowhere.txt: expected a readable file of text"),
        (1, ["--prompt=a", "--lora=nowhere"], "nowhere"),
        (1, ["--prompt=a", "--dtype=float7"], "float7"),
        (1, ["--prompt=a", "--top_p=0"], "Sampling.top_p"),
        (2, [], "Exactly one of (prompt, prompts)"),
        (2, ["--prompt=a", "--prompts=b"], "Exactly one of (prompt, prompts)"),
        (2, ["--prompt=a", "--attention"], "--attention needs --prompt and --out"),
        (2, ["--prompt=a", "--tokens=0"], "--tokens=0"),
    ],
)
def test_each_failure_is_one_clear_line(code, words, message, folder, capsys):
    assert message in failure(capsys, code, "text", f"--model={folder}", *words)


def test_other_models_and_templates(folder, tmp_path, capsys, monkeypatch):
    line = failure(capsys, 1, "text", "--model=scenes-clip", "--prompt=a")
    assert "scenes-clip: expected a language model, e.g. of the Llama family, found a Clip" in line
    assert "nowhere" in failure(capsys, 1, "text", "--model=nowhere", "--prompt=a")
    for kind, message in (
        (None, "expected a chat template in the tokenizer's files, found none"),
        ("{{ messages }}", "none that is known here"),
    ):
        other = tmp_path / str(kind is None)
        shutil.copytree(folder, other)
        settings = json.loads((other / "tokenizer_config.json").read_text())
        settings |= {"chat_template": kind}
        (other / "tokenizer_config.json").write_text(json.dumps(settings))
        assert message in failure(capsys, 1, "chat", f"--model={other}")
        assert converse(monkeypatch, capsys, other, ["/exit"], "--template=plain") == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n \n", "expected one prompt a line, found none"),
        ('{"text": "a"}', ":1: expected the key 'prompt'"),
        ('{"prompt": "a"}\n{"prompt": " "}', ":2: prompt: expected a text that is not blank"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}', "expected a new id, found '1'"),
        ("{", ":1: "),
    ],
)
def test_damaged_files_of_prompts(content, message, folder, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    assert message in failure(capsys, 1, "text", f"--model={folder}", f"--prompts={file}")
