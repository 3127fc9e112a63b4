"""Conversation templates: turns to the text that a language model was trained on.

`vicuna_v1`, `llava_v1`, `plain` and `llava_v0` are LLaVA's (arXiv 2304.08485, 2310.03744), `groma`
and `groma_stage2` those of arXiv 2404.13013, `chatml` is the format of Qwen2 and SmolLM2. The
strings are data: models answer to these and to no others.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from perception_jax.data.records import Turn
from perception_jax.errors import ConfigError, DataError, did_you_mean

AUTO = "auto"
"""Name for the template that a tokenizer's files describe."""
IMAGE_TEXT = "<image>"
"""Placeholder of an image in a turn."""
SEPARATOR = "<sep>"
"""Mark around a supervised answer in `groma`; it is taken out of the ids."""

Rule = Literal["v1", "v0", "plain", "separated", "spans"]
"""How a template's label mask is made; see `labels`."""


@dataclasses.dataclass(frozen=True)
class Template:
    """Text of a conversation.

    Attributes:
      system: the first part; a first turn of the role "system" takes its place.
      user, assistant: before a turn, e.g. "USER: "; without its last space where the turn is empty.
      after_system, after_user, after_assistant: behind a part that is not empty.
      before_system: before the system text.
      rule: of the label mask.
      opening: turns before every conversation.
    """

    system: str
    user: str
    assistant: str
    after_system: str
    after_user: str
    after_assistant: str
    rule: Rule
    before_system: str = ""
    opening: tuple[Turn, ...] = ()

    def prompt(self, turns: Sequence[Turn], *, answer: bool = False) -> str:
        """The text of a conversation.

        Args:
          turns: of user and assistant in turn, the user first; an answer before that is dropped.
          answer: whether the text ends with the beginning of the assistant's next turn.

        Raises:
          DataError: two turns of one role in a row, or no turn.
        """
        return "".join(text for text, _ in self.parts(turns, answer=answer))

    def parts(self, turns: Sequence[Turn], *, answer: bool = False) -> list[tuple[str, bool]]:
        """The text of `prompt` in parts, and whether the assistant wrote each of them."""
        system, turns = self.split(turns)
        before, after = self.before_system, self.after_system
        parts = [(before + system + after, False)]
        for turn in (*self.opening, *turns):
            own = turn.role == "assistant"
            role = self.assistant if own else self.user
            parts.append((role if turn.text else role.rstrip(" "), False))
            if turn.text:
                parts.append((turn.text + (self.after_assistant if own else self.after_user), own))
        if answer:
            parts.append((self.assistant.rstrip(" "), False))
        return parts

    def with_system(self, text: str) -> Template:
        """Returns a template with another system text; without what is around it if it is empty."""
        if text:
            return dataclasses.replace(self, system=text)
        return dataclasses.replace(self, system="", before_system="", after_system="")

    def split(self, turns: Sequence[Turn]) -> tuple[str, list[Turn]]:
        """The system text and the turns of user and assistant. Raises as `prompt`."""
        system, rest = self.system, list(turns)
        if rest and rest[0].role == "system":
            system = rest.pop(0).text
        if rest and rest[0].role == "assistant":
            del rest[0]
        for index, turn in enumerate(rest):
            expected = ("user", "assistant")[index % 2]
            if turn.role != expected:
                raise DataError(
                    f"conversation: expected turn {index} from the {expected}, found {turn.role}: "
                    f"{turn.text[:60]!r}. Join turns of one role."
                )
        if not rest:
            raise DataError("conversation: expected a turn of the user, found none.")
        return system, rest


def images_first(turns: Sequence[Turn], *, around: tuple[str, str] = ("", "")) -> tuple[Turn, ...]:
    """LLaVA's place of images: before the text of a turn, one for all placeholders of the turn.

    Args:
      turns: of a conversation with images.
      around: text before and behind a placeholder, e.g. ("<im_start>", "<im_end>").
    """
    image = IMAGE_TEXT.join(around)
    return tuple(
        dataclasses.replace(turn, text=f"{image}\n{_without_images(turn.text)}".strip())
        if IMAGE_TEXT in turn.text
        else turn
        for turn in turns
    )


def repeat_images(text: str, counts: Sequence[int], placeholder: str = IMAGE_TEXT) -> str:
    """Each placeholder as often as its image has tokens, as processors of llava-hf and Qwen2-VL do.

    Args:
      text: a prompt.
      counts: of tokens, by image.
      placeholder: a token of the model's tokenizer.

    Raises:
      DataError: another number of placeholders than of images.
    """
    parts = text.split(placeholder)
    if len(parts) != len(counts) + 1:
        raise DataError(
            f"prompt: expected {len(counts)} placeholders {placeholder}, one for each image, found "
            f"{len(parts) - 1}."
        )
    return parts[0] + "".join(
        placeholder * count + part for count, part in zip(counts, parts[1:], strict=True)
    )


def _without_images(text: str) -> str:
    return text.replace(IMAGE_TEXT, "").strip()


def _system(who: str) -> str:
    return (
        f"A chat between a curious {who} and an artificial intelligence assistant. The assistant "
        f"gives helpful, detailed, and polite answers to the {who}'s questions."
    )


_GROMA_OPENING = (
    Turn(
        role="user",
        text="Here is an image with region crops from it. Image: <image>. Regions: <region>.",
    ),
    Turn(role="assistant", text="Thank you for the image! How can I assist you with it?"),
)
_V1 = Template(
    system=_system("user"),
    user="USER: ",
    assistant="ASSISTANT: ",
    after_system=" ",
    after_user=" ",
    after_assistant="</s>",
    rule="v1",
)
_GROMA = dataclasses.replace(_V1, rule="separated", opening=_GROMA_OPENING)
_V0 = Template(
    system=_system("human"),
    user="Human: ",
    assistant="Assistant: ",
    after_system="###",
    after_user="###",
    after_assistant="###",
    rule="v0",
)

TEMPLATES: Mapping[str, Template] = {
    "vicuna_v1": _V1,
    "llava_v1": dataclasses.replace(_V1, system=_system("human")),
    "plain": Template("", "", "", "", "", "\n", rule="plain"),
    "llava_v0": _V0,
    "groma": _GROMA,
    "groma_stage2": dataclasses.replace(_GROMA, after_assistant=" "),
    "chatml": Template(
        system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        user="<|im_start|>user\n",
        assistant="<|im_start|>assistant\n",
        before_system="<|im_start|>system\n",
        after_system="<|im_end|>\n",
        after_user="<|im_end|>\n",
        after_assistant="<|im_end|>\n",
        rule="spans",
    ),
}
"""Templates by name; `chatml` has SmolLM2's system text. LLaVA's `v0` is `llava_v0` with an example
conversation, which is not part of this package, as `opening`."""

LLAVA = "vicuna_v1"
"""Name of the template of LLaVA-1.5."""


def named(name: str, names: Collection[str] = TEMPLATES.keys()) -> Template:
    """The template of a name.

    Raises:
      ConfigError: it is not one of `names`.
    """
    if name not in names:
        raise ConfigError(
            f"template: expected {AUTO} or the name of a template, found {name!r}"
            f"{did_you_mean(name, (AUTO, *names))}"
        )
    return TEMPLATES[name]


def for_images(name: str, jinja: str | None, names: Collection[str] = TEMPLATES.keys()) -> Template:
    """The template with which a model that reads images is trained and asked.

    Args:
      name: of a template; `AUTO` is what the tokenizer's chat template describes, or `LLAVA`
        without one that is known here.
      jinja: the tokenizer's chat template.
      names: those that are allowed.

    Raises:
      ConfigError: `name` is not one of them.
    """
    if name != AUTO:
        return named(name, names)
    return (from_jinja(jinja) if jinja else None) or TEMPLATES[LLAVA]


_CHATML_SYSTEM = re.compile(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}]*)<\|im_end\|>")


def from_jinja(text: str) -> Template | None:
    """The template that a tokenizer's chat template describes; None for one that is not known here.

    Jinja is not run: templates of the form of `chatml` are recognised by their marks, and their
    system text is read out.
    """
    if not all(mark in text for mark in ("<|im_start|>", "<|im_end|>")):
        return None
    found = _CHATML_SYSTEM.search(text)
    return TEMPLATES["chatml"].with_system(found[1] if found else "")
