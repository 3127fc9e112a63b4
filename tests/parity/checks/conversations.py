"""Golden checks of `data.tokenization` and `data.conversation`: ids, texts, prompts, masks."""

from __future__ import annotations

import json
import re

import numpy as np

from perception_jax.data.conversation import (
    IGNORE,
    IMAGE,
    SEPARATOR,
    TEMPLATES,
    encode,
    images_first,
)
from perception_jax.data.records import Turn
from perception_jax.data.tokenization import Encoding, LanguageTokenizer, read_tokenizer
from tests.parity.cases import Case, check

NAMES = {"v1": "vicuna_v1", "default": "groma_stage2", "llava": "groma"}
"""Our names of templates where a case has others."""
ROLES = {"human": "user", "gpt": "assistant"}


class ToyTokenizer:
    """The case's own tokenizer: words and characters of a list, by its regular expression."""

    def __init__(self, settings: dict, vocab: list[str]) -> None:
        self.settings, self.ids = settings, {piece: k for k, piece in enumerate(vocab)}
        self.start_id, self.end_id = settings["bos_token_id"], settings["eos_token_id"]
        self.pad_id = settings["pad_token_id"]

    def __call__(self, text: str) -> np.ndarray:
        ids = [self.start_id] * self.settings["add_bos"]
        end, space = self.settings["eos_text"], self.settings["space_symbol"]
        for segment in re.split(f"({re.escape(end)})", text):
            if segment == end:
                ids.append(self.end_id)
            elif segment:
                pieces = re.findall(
                    self.settings["piece_regex"], space + segment.replace(" ", space)
                )
                ids += [self.ids[piece] for piece in pieces]
        return np.array(ids, np.int32)

    def encode(self, text: str) -> Encoding:
        raise NotImplementedError

    def token_id(self, text: str) -> int | None:
        return self.ids.get(text)


def llava_tokenizer(case: Case) -> LanguageTokenizer:
    """The case's `tokenizer.model` with the padding token that LLaVA sets."""
    settings = case.settings["sp_tokenizer"]
    assert (settings["type"], settings["pad_token_id"]) == ("llama_slow", settings["unk_token_id"])
    flags = {"add_bos_token": settings["add_bos"], "add_eos_token": settings["add_eos"]}
    files = {
        "tokenizer.model": (case.directory / settings["file"]).read_bytes(),
        "tokenizer_config.json": json.dumps(flags | {"pad_token": "<unk>"}).encode(),
    }
    mode = "slow_legacy" if settings["legacy"] else "slow"
    tokenizer = LanguageTokenizer(files, mode)
    assert tokenizer.vocab_size == settings["num_pieces"]
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id) == (
        *(settings["bos_token_id"], settings["eos_token_id"]),
        settings["pad_token_id"],
    )
    return tokenizer


@check("mmvp_mof", when=lambda case: case.name.startswith("conv_mask"))
def conv_mask(case: Case) -> None:
    settings = case.settings
    assert (settings["ignore_index"], settings["image_token_index"]) == (IGNORE, IMAGE)
    assert not settings["mm_use_im_start_end"]
    cases = json.loads((case.directory / "cases.json").read_text())
    toy = settings["toy_tokenizer"]
    vocab = json.loads((case.directory / toy["vocab_file"]).read_text())
    tokenizers = {"toy": ToyTokenizer(toy, vocab), "sp": llava_tokenizer(case)}
    for kind, names in settings["templates"].items():
        for name in names:
            template = TEMPLATES[NAMES.get(name, name)]
            for row, expected in cases[kind][name].items():
                what = f"{kind}.{name}.{row}"
                turns = [
                    Turn(role=ROLES[turn["from"]], text=turn["value"])
                    for turn in expected["conversations"]
                ]
                if expected["has_image"]:
                    turns = images_first(turns)
                after = [turn["value"] for turn in expected["after_preprocess_multimodal"]]
                assert [turn.text for turn in turns] == after, what
                if template.rule != "plain":
                    assert template.prompt(turns) == expected["prompt"], what
                found = encode(
                    tokenizers[kind],
                    turns,
                    template,
                    images=expected["has_image"],
                    max_length=settings["model_max_length"],
                )
                for key, values in (("input_ids", found.ids), ("labels", found.labels)):
                    np.testing.assert_array_equal(values, expected[key], err_msg=what)
                    stored = case.arrays[f"{what}.{key}"]
                    np.testing.assert_array_equal(values, stored, err_msg=what)
                assert found.warning == expected["warning"].strip(), what


def groma_turns(prompt: str, opening: int) -> list[Turn]:
    """The turns that Groma's dataset classes made, read back from a prompt.

    Args:
      prompt: the text with separators.
      opening: characters before the first turn.
    """
    rounds = re.findall(
        rf"USER: (.*?) ASSISTANT: {SEPARATOR}(.*?){SEPARATOR}", prompt[opening:], re.DOTALL
    )
    roles = ("user", "assistant")
    return [
        Turn(role=role, text=text)
        for pair in rounds
        for role, text in zip(roles, pair, strict=True)
    ]


@check("groma", when=lambda case: case.name.startswith("text_and_labels"))
def text_and_labels(case: Case) -> None:
    """The dataset classes themselves belong to the system; here their turns are read back."""
    settings = case.settings["tokenizer"]
    assert (settings["type"], case.settings["ignore_index"]) == ("llama_slow", IGNORE)
    tokenizer = read_tokenizer(case.directory)
    assert tokenizer.mode == ("slow_legacy" if settings["legacy"] else "slow")
    assert tokenizer.vocab_size == settings["num_pieces"] + settings["num_added_tokens"]
    assert tokenizer.max_length == settings["model_max_length"]
    cases = json.loads((case.directory / "cases.json").read_text())
    for row in cases["strings"]:
        ids = tokenizer(row["text"]).tolist()
        assert ids == row["ids"], row["text"]
        assert tokenizer.decode(ids, special=True) == row["decode_keep"]
        assert tokenizer.decode(ids) == row["decode_skip"]
        stream = tokenizer.stream()
        assert "".join(stream.push([k]) for k in ids) + stream.close() == row["decode_skip"]
    for row in cases["dataset_cases"]:
        template = TEMPLATES[NAMES[row["conv"]]]
        opening = template.prompt([Turn(role="user", text="")])
        turns = groma_turns(row["prompt"], len(opening) - len("USER:"))
        assert len(turns) == row["prompt"].count(SEPARATOR), row["name"]
        tokens = [tokenizer.token_id(token) for token in row["tokens"]]
        np.testing.assert_array_equal(tokenizer(row["prompt"]), tokens, err_msg=row["name"])
        found = encode(
            tokenizer, turns, template, images=False, max_length=settings["model_max_length"]
        )
        np.testing.assert_array_equal(found.ids, row["input_ids"], err_msg=row["name"])
        np.testing.assert_array_equal(found.labels, row["labels"], err_msg=row["name"])


@check("tokenizers", when=lambda case: "modes" in case.settings)
def language_tokenizer(case: Case) -> None:
    """Ids and texts of every mode, and the same texts from streams of single ids."""
    cases = json.loads((case.directory / "cases.json").read_text())
    assert cases.keys() == case.settings["modes"].keys()
    for mode, rows in cases.items():
        tokenizer = read_tokenizer(case.directory, mode)
        for row in rows["texts"]:
            assert tokenizer(row["text"]).tolist() == row["ids"], (mode, row["text"])
        for row in rows["texts"] + rows["decode"]:
            assert tokenizer.decode(row["ids"], special=True) == row["keep"], (mode, row["ids"])
            assert tokenizer.decode(row["ids"]) == row["skip"], (mode, row["ids"])
            stream = tokenizer.stream()
            pushed = "".join(stream.push([number]) for number in row["ids"])
            assert pushed + stream.close() == row["skip"], (mode, row["ids"])
