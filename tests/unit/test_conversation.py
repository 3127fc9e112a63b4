"""Conversations: prompts and label masks by hand, on characters and on a tiny Llama vocabulary."""

from __future__ import annotations

import dataclasses
import functools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception_jax.data import conversation
from perception_jax.data.conversation import (
    IGNORE,
    IMAGE,
    TEMPLATES,
    EncodedConversation,
    Template,
    encode,
)
from perception_jax.data.records import Turn
from perception_jax.data.tokenization import Encoding, LanguageTokenizer
from perception_jax.data.tokenization.sentencepiece import write_sentencepiece
from perception_jax.errors import ConfigError, DataError
from perception_jax.testing.tiny_llama_vocabulary import MODEL

PLAIN, VICUNA, V0 = TEMPLATES["plain"], TEMPLATES["vicuna_v1"], TEMPLATES["llava_v0"]
GROMA, CHATML = TEMPLATES["groma"], TEMPLATES["chatml"]


def turns(*texts: str, first: str = "user") -> list[Turn]:
    """Texts of user and assistant in turn."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [Turn(role=roles[k % 2], text=text) for k, text in enumerate(texts)]


class Characters:
    """A start token (1), then one token for each character; `whole` are single tokens from 2 on."""

    start_id, end_id, pad_id = 1, 2, 0

    def __init__(self, *whole: str) -> None:
        self.whole = ("</s>", *whole)
        self.pattern = re.compile("|".join([*map(re.escape, self.whole), "."]), re.DOTALL)

    def __call__(self, text: str) -> np.ndarray:
        return np.concatenate([[self.start_id], self.encode(text).ids]).astype(np.int32)

    def encode(self, text: str) -> Encoding:
        found = list(self.pattern.finditer(text))
        ids = [self.token_id(match[0]) or 100 + ord(match[0]) for match in found]
        spans = [match.span() for match in found]
        return Encoding(np.array(ids, np.int32), np.array(spans, np.int32).reshape(-1, 2))

    def token_id(self, text: str) -> int | None:
        return 2 + self.whole.index(text) if text in self.whole else None


def kept(found: EncodedConversation) -> str:
    """The supervised text, with "_" for what is not and "|" for tokens of no character."""
    assert np.array_equal(found.labels[found.labels != IGNORE], found.ids[found.labels != IGNORE])
    return "".join(
        "_" if label == IGNORE else chr(label - 100) if label >= 100 else "|"
        for label in found.labels
    )


@functools.cache
def llama() -> LanguageTokenizer:
    """With the padding token that LLaVA sets."""
    named = json.dumps({"pad_token": "<unk>"}).encode()
    content = {"tokenizer.model": write_sentencepiece(MODEL), "tokenizer_config.json": named}
    return LanguageTokenizer(content, "slow_legacy")


def test_prompts():
    system = VICUNA.system
    assert system.endswith("to the user's questions.")
    assert VICUNA.prompt(turns("hi", "yes", "why")) == (
        f"{system} USER: hi ASSISTANT: yes</s>USER: why "
    )
    assert VICUNA.prompt(turns("hi"), answer=True) == f"{system} USER: hi ASSISTANT:"
    assert VICUNA.prompt(turns("a", "", "b", "c")) == (
        f"{system} USER: a ASSISTANT:USER: b ASSISTANT: c</s>"
    )
    assert V0.prompt(turns("a", "b"), answer=True) == (
        f"{V0.system}###Human: a###Assistant: b###Assistant:"
    )
    assert TEMPLATES["llava_v1"].prompt(turns("a")).startswith(V0.system + " USER: a")
    opening = "USER: Here is an image with region crops from it. Image: <image>. Regions: <region>."
    assert f"{opening} ASSISTANT: Thank you for the image!" in GROMA.prompt(turns("a"))
    assert GROMA.prompt(turns("a"), answer=True).endswith("with it?</s>USER: a ASSISTANT:")
    assert TEMPLATES["groma_stage2"].prompt(turns("a")).endswith("with it? USER: a ")
    assert CHATML.prompt([Turn(role="system", text="S"), *turns("a", "b")], answer=True) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>assistant\n"
    )


def test_turns_that_no_template_takes():
    assert VICUNA.prompt(turns("hello", "a", first="assistant")) == VICUNA.prompt(turns("a"))
    twice = [*turns("a"), *turns("b")]
    with pytest.raises(DataError, match="turn 1 from the assistant, found user: 'b'"):
        VICUNA.prompt(twice)
    for nothing in ([], turns("hello", first="assistant"), [Turn(role="system", text="S")]):
        with pytest.raises(DataError, match="expected a turn of the user"):
            VICUNA.prompt(nothing)


@pytest.mark.parametrize("line", ["\n", "\\n"])
def test_chat_templates_are_known_by_their_marks(line):
    """SmolLM2's form, one without a system text of its own as Qwen3's, and others."""
    said = f"'<|im_start|>system{line}Be kind.<|im_end|>{line}'"
    turn = f"'<|im_start|>' + message['role'] + '{line}' + message['content'] + '<|im_end|>{line}'"
    assert conversation.from_jinja(f"{{{{ {said} }}}}{{{{ {turn} }}}}") == dataclasses.replace(
        CHATML, system="Be kind."
    )
    named = f"'<|im_start|>system{line}' + messages[0]['content'] + '<|im_end|>{line}'"
    without = conversation.from_jinja(f"{{{{ {named} }}}}{{{{ {turn} }}}}")
    assert without.prompt(turns("a"), answer=True) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )
    for other in ("", "{{ '[INST]' + content + '[/INST]' }}", "{{ '<|im_start|>' }}"):
        assert conversation.from_jinja(other) is None


def test_a_model_with_images_has_its_tokenizers_template_or_that_of_llava():
    chatml = "<|im_start|>user {{ message }}<|im_end|>"
    described = conversation.from_jinja(chatml)
    assert conversation.for_images("auto", chatml) == described != conversation.TEMPLATES["chatml"]
    for unknown in (None, "USER: {{ message }} ASSISTANT:"):
        assert conversation.for_images("auto", unknown) == conversation.TEMPLATES["vicuna_v1"]
    assert conversation.for_images("plain", chatml) == conversation.TEMPLATES["plain"]
    with pytest.raises(ConfigError, match="expected auto or the name of a template"):
        conversation.for_images("plain", chatml, ("chatml",))


def test_another_system_text():
    assert VICUNA.with_system("Short.").prompt(turns("a")) == "Short. USER: a "
    assert VICUNA.with_system("").prompt(turns("a")) == "USER: a "


def test_images_come_first():
    given_ = turns("what <image> is\n<image>", "a <image>", "none", "b")
    placed = [turn.text for turn in conversation.images_first(given_)]
    assert placed == ["<image>\nwhat  is", "<image>\na", "none", "b"]
    (only,) = conversation.images_first(turns(" <image> "), around=("<im_start>", "<im_end>"))
    assert only.text == "<im_start><image><im_end>"


def test_image_tokens():
    ids = conversation.tokenize(Characters(), "a<image>b<image><image>")
    assert ids.tolist() == [1, 197, IMAGE, 198, IMAGE, IMAGE]
    assert conversation.image_spans(ids).tolist() == [[2, 3], [4, 5], [5, 6]]
    assert conversation.image_spans(ids, counts=[1, 2]).tolist() == [[2, 3], [4, 6]]
    with pytest.raises(DataError, match="expected 4 placeholders for 2 images, found 3"):
        conversation.image_spans(ids, counts=[1, 3])
    assert conversation.tokenize(Characters(), "<image>").tolist() == [1, IMAGE]
    assert conversation.image_spans(ids, 197).tolist() == [[1, 2]]
    assert conversation.image_spans(ids[:0]).shape == (0, 2)


def test_repeated_placeholders():
    text = conversation.repeat_images("a <image><image> b", [2, 3])
    assert text == "a " + "<image>" * 5 + " b"
    assert conversation.repeat_images("<|x|>", [2], "<|x|>") == "<|x|><|x|>"
    with pytest.raises(DataError, match=r"expected 2 placeholders <image>, one for each.*found 1"):
        conversation.repeat_images("<image>", [1, 1])


def test_prompts_with_images():
    """LLaVA's tokenizer has no token for an image, llava-hf's has one among the others."""
    text = "the <image><image>\ncat"
    before, behind = (llama()(part).tolist() for part in ("the ", "\ncat"))
    found = conversation.tokenize_images(llama(), text, [2, 3])
    # Between both images is an empty text, a start token that is left out.
    assert found.tolist() == [*before, *[IMAGE] * 5, *behind[1:]]
    assert conversation.tokenize_images(llama(), "cat", []).tolist() == llama()("cat").tolist()
    added = Characters("<image>")
    token = int(added.encode("<image>").ids[0])
    found = conversation.tokenize_images(added, text, [2, 3], image_id=token)
    assert found.tolist() == [*added("the "), *[IMAGE] * 5, *added("\ncat")[1:]]
    with pytest.raises(DataError, match="expected 1 placeholders"):
        conversation.tokenize_images(llama(), text, [2])
    with pytest.raises(DataError, match="expected 5 placeholders for 2 images, found 0"):
        conversation.tokenize_images(added, text, [2, 3], image_id=99999)


def test_rounds_are_counted_as_the_reference_counts(caplog):
    """Answers are supervised with the "\u2581" before their first word and with their end tokens;
    where counts differ, nothing is, and a warning says so."""
    text = [*turns("<image>\nc", "at cat"), *turns("c", "at")]
    found = encode(llama(), text, VICUNA, images=True)
    answer = [piece for piece in found.labels.tolist() if piece != IGNORE]
    expected = [*llama().encode("at cat").ids, 2, *llama().encode("at").ids, 2]
    assert answer == expected
    assert not found.warning
    twice = encode(llama(), turns("a", "b ASSISTANT: c"), VICUNA, images=False)
    assert (twice.labels == IGNORE).all()
    assert twice.warning == f"WARNING: tokenization mismatch: 1 vs. {len(twice.ids)}. (ignored)"
    assert caplog.messages == [twice.warning]


def test_long_conversations():
    """Text alone is cut and keeps its labels; one with an image is left whole."""
    long = turns("a", "cat " * 50)
    whole = encode(llama(), long, VICUNA, images=False)
    cut = encode(llama(), long, VICUNA, images=False, max_length=len(whole.ids) - 40)
    assert len(cut.ids) == len(whole.ids) - 40
    assert not cut.warning
    assert np.array_equal(cut.labels, whole.labels[:-40])
    assert (cut.labels != IGNORE).any()
    image = encode(llama(), turns("<image>\na", "cat " * 50), VICUNA, images=True, max_length=9)
    assert len(image.ids) > len(whole.ids)


def test_v0_counts_a_start_token_for_each_turn():
    """So the mask moves by one with each turn; two tokens ("###", " " with Llama's) stay before."""
    template = dataclasses.replace(V0, system="S", user="H: ", assistant="A: ")
    text = "S\n\n### H: a\n### A: b\n### "
    found = encode(Characters(), turns("a", "b"), template, images=False)
    assert "".join(chr(k - 100) for k in found.ids[1:]) == text
    # 1 + 3 of the header; a turn of 9 characters is counted as 10, so from 6 to 14.
    assert kept(found) == "____##________## A: b\n### "
    assert kept(encode(Characters(), turns("a", "b"), template, images=True)) == kept(found)
    answer_first = encode(Characters(), turns("b", "a", first="assistant"), template, images=False)
    assert kept(answer_first).startswith("____### A: b\n##")


def test_plain_is_an_image_and_its_caption():
    found = encode(Characters(), turns("describe <image>", "a dog"), PLAIN, images=True)
    assert kept(found) == "__a dog\n"
    assert found.ids[:2].tolist() == [1, IMAGE]
    for wrong in (turns("describe", "a"), turns("<image>", "a", "b")):
        with pytest.raises(DataError, match="question with <image> and a caption"):
            encode(Characters(), wrong, PLAIN, images=True)


def test_groma_supervises_what_separators_enclose():
    """And every end token but the first; text behind the last answer is not masked."""
    tokenizer = Characters("<sep>")
    template = dataclasses.replace(GROMA, system="S", opening=tuple(turns("hi", "ok")))
    found = encode(tokenizer, turns("a", "no", "b", "so"), template, images=False)
    text = "S USER: hi ASSISTANT: ok|USER: a ASSISTANT: no|USER: b ASSISTANT: so|"
    ids = "".join(chr(k - 100) if k >= 100 else "|" for k in found.ids[1:])
    assert ids == text
    masked = re.sub("[^|]", "_", text[: text.index("no")]).replace("|", "_")
    assert kept(found) == "_" + masked + "no|" + "_" * len("USER: b ASSISTANT: ") + "so|"
    longest = len(found.ids) + 3  # with three of the four separators
    with pytest.raises(DataError, match=f"answers within {longest} tokens"):
        encode(
            tokenizer, turns("a", "no", "b", "so" * 9), template, images=False, max_length=longest
        )
    with pytest.raises(ConfigError, match="expected the token <sep>"):
        encode(Characters(), turns("a", "b"), template, images=False)


def test_spans_are_what_the_assistant_wrote():
    tokenizer = Characters("<|im_start|>", "<|im_end|>")
    template = dataclasses.replace(CHATML, system="S")
    found = encode(tokenizer, turns("a\n", "b\n", "c", "dd"), template, images=False)
    question = len(template.prompt(turns("a\n"), answer=True)) - 11 * 3 - 9 * 2 + 1
    assert kept(found).lstrip("_").startswith("b\n|_")
    assert kept(found).endswith("dd|_")
    assert kept(found).index("b") == question
    cut = encode(tokenizer, turns("a\n", "b\n"), template, images=False, max_length=question + 1)
    assert kept(cut).endswith("_b")


def test_spans_beside_images():
    """An image is one id that is never supervised, whoever put it there."""
    tokenizer = Characters("<|im_start|>", "<|im_end|>")
    template = dataclasses.replace(CHATML, system="S")
    plain = encode(tokenizer, turns("ab", "cd", "e", "fg"), template, images=False)
    texts = turns("<image>a<image>b", "c<image>d", "e", "fg<image>")
    found = encode(tokenizer, texts, template, images=True)
    places = found.ids == IMAGE
    assert places.sum() == 4
    np.testing.assert_array_equal(found.ids[~places], plain.ids)
    np.testing.assert_array_equal(found.labels[~places], plain.labels)
    assert (found.labels[places] == IGNORE).all()


words = st.text(st.sampled_from("cat \nhes=>"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=3), st.booleans())
def test_masks_of_any_conversation(rounds, images):
    """Labels are ids or ignored, the start and the system text always are, and a mask with answers
    supervises as many end tokens as there are answers."""
    texts = [text for pair in rounds for text in pair]
    texts[0] = "<image>\n" + texts[0] if images else texts[0]
    tokenizer = llama()
    found = encode(tokenizer, turns(*texts), VICUNA, images=images)
    kept_ = found.labels != IGNORE
    assert np.array_equal(found.labels[kept_], found.ids[kept_])
    assert not kept_[: len(tokenizer(VICUNA.system))].any()
    answers = sum(bool(text) for text in texts[1::2])
    if not found.warning:
        assert (found.labels == tokenizer.end_id).sum() <= answers
    if all(texts) and not any(text[-1:].isspace() or text[:1].isspace() for text in texts):
        assert not found.warning
        assert (found.labels == tokenizer.end_id).sum() == answers


def test_rows_of_a_batch():
    ids = np.array([1, 5, 6, 2], np.int32)
    long = EncodedConversation(ids, np.array([IGNORE, 5, 6, 2], np.int32))
    short = EncodedConversation(ids[:2], ids[:2])
    right = conversation.pad([long, short], 0, max_length=3)
    assert right["ids"].tolist() == [[1, 5, 6], [1, 5, 0]]
    assert right["label"].tolist() == [[IGNORE, 5, 6], [1, 5, IGNORE]]
    assert right["id_mask"].tolist() == [[True] * 3, [True, True, False]]
    left = conversation.pad([long, short], 0, max_length=9, length=5, side="left")
    assert left["ids"].tolist() == [[0, 1, 5, 6, 2], [0, 0, 0, 1, 5]]
    assert left["label"][1].tolist() == [IGNORE] * 3 + [1, 5]
    with pytest.raises(ConfigError, match="length: expected at least 4 tokens, found 3"):
        conversation.pad([long], 0, max_length=9, length=3)
    with pytest.raises(ConfigError, match="'right' or 'left'"):
        conversation.pad([long], 0, max_length=9, side="top")


def test_every_template_has_a_rule():
    for name, template in TEMPLATES.items():
        assert isinstance(template, Template)
        tokenizer = Characters("<sep>", "<|im_end|>")
        found = encode(
            tokenizer, turns("<image>\na", "b"), template, images=template.rule in ("v1", "plain")
        )
        assert (found.labels != IGNORE).any() or found.warning, name
