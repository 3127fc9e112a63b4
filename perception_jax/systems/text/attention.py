"""Attention of an answer's tokens over its prompt. Letters: A answer tokens, P prompt tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from perception_jax.errors import ConfigError
from perception_jax.inference.single_image import listed
from perception_jax.nn.taps import Taps
from perception_jax.systems.text.model import TextModel
from perception_jax.viz import Report, heat_table

_MARKS = {"\n": "↵", "\t": "⇥", " ": "·"}
"""How white space is shown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptAttention:
    """Attention over a prompt at the moments at which the tokens of its answer were chosen.

    Attributes:
      prompt, answer: text of each token, special ones spelt out.
      rows: mean over heads of one layer; a row's rest is attention to the answer so far.
    """

    prompt: tuple[str, ...]
    answer: tuple[str, ...]
    rows: Float[np.ndarray, "A P"]

    def to_json(self) -> dict[str, Any]:
        """Texts of the tokens, and the rows."""
        return {"prompt": self.prompt, "answer": self.answer, "rows": listed(self.rows)}


def prompt_attention(
    model: TextModel, prompt: Sequence[int], answer: Sequence[int], *, layer: int = -1
) -> PromptAttention:
    """Reads prompt and answer once more, and records the rows of one layer.

    Args:
      prompt, answer: tokens; at least one of each.
      layer: negative counts from the end.

    Raises:
      ConfigError: the model has no such layer, or the answer is empty.
    """
    if not answer:
        raise ConfigError("attention: expected an answer of at least one token, found none.")
    chosen_at = jnp.arange(len(prompt) - 1, len(prompt) - 1 + len(answer))
    taps = Taps(attention=(layer,), rows=chosen_at)
    found = model.generator.prefill([[*prompt, *answer[:-1]]], taps=taps).attention
    rows = np.asarray(found, np.float32)[0, 0].mean(axis=0)[:, : len(prompt)]
    return PromptAttention(
        prompt=tuple(_spelt(model, token) for token in prompt),
        answer=tuple(_spelt(model, token) for token in answer),
        rows=rows,
    )


def attention_page(found: Mapping[str, PromptAttention], *, subtitle: str, layer: int) -> Report:
    """Draws a page with a table for each prompt: its tokens by tokens of the answer.

    The first token is left out: most attention that is needed nowhere goes to it, and every other
    cell would be white.

    Args:
      found: by the text of the prompt.
      layer: whose rows these are; negative counts from the end.
    """
    page = Report("Attention over the prompt", subtitle)
    for prompt, one in found.items():
        rows = one.rows.copy()
        first = rows[:, 0].mean()
        rows[:, 0] = np.nan
        table = heat_table(
            rows.T, one.prompt, one.answer, f"Layer {layer}", percent=True, numbered=False
        )
        page.add_section(prompt if len(prompt) < 80 else f"{prompt[:79]}…")
        page.add_chart(
            table,
            "Rows: tokens of the prompt; columns: tokens of the answer when they were chosen; mean "
            f"over heads. The first token, which gets {first:.0%} on average, is not drawn; the "
            f"largest value is {np.max(rows[:, 1:], initial=0.0):.0%}.",
        )
    return page


def _spelt(model: TextModel, token: int) -> str:
    """The text of a token with the space before it, which decoders drop at the start of a text."""
    decode = model.tokenizer.decode
    text = decode([token], special=True)
    if model.tokenizer.token_id(text) != token:
        text = decode([token, token])[len(decode([token])) :] or text
    return "".join(_MARKS.get(letter, letter) for letter in text) or f"#{token}"
