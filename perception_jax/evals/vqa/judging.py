"""Requests to a language model that judges answers, as files; nothing is sent from here.

A request file has the form of OpenAI's Batch API: a JSON object a line with `custom_id`, `method`,
`url` and `body` (model, messages, temperature). A reply file is that API's output file, or has
lines with `custom_id` and `reply`.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from perception_jax.data.sources import fields
from perception_jax.errors import DataError
from perception_jax.evals.vqa.asking import read_lines, write_lines

MODEL = "gpt-4-0314"
"""The judge of the published numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A request to a judge.

    Attributes:
      id: unique in its file.
      body: keyword arguments of a chat completion.
    """

    id: str
    body: Mapping[str, Any]


def chat(system: str, user: str, *, model: str = MODEL, **more: Any) -> dict[str, Any]:
    """The body of a request with one system and one user message."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return {"model": model, "messages": messages, **more}


def write_requests(path: str | os.PathLike[str], requests: Sequence[Request]) -> pathlib.Path:
    """Writes a request file."""
    rows = (
        {"custom_id": one.id, "method": "POST", "url": "/v1/chat/completions", "body": one.body}
        for one in requests
    )
    return write_lines(path, rows)


def read_replies(path: str | os.PathLike[str], ids: Sequence[str]) -> list[str]:
    """The reply to each request.

    Raises:
      DataError: a line is damaged, an id comes twice or is unknown, or a reply is missing.
    """
    found: dict[str, str] = {}
    for number, row in enumerate(read_lines(path, "custom_id"), 1):
        where = f"{path}: object {number}"
        if row["custom_id"] in found:
            raise DataError(f"{where}: expected a new custom_id, found {row['custom_id']!r} again.")
        found[row["custom_id"]] = _reply(row, where)
    missing, unknown = [i for i in ids if i not in found], sorted(set(found) - set(ids))
    if missing or unknown:
        raise DataError(
            f"{path}: expected a reply to each of {len(ids)} requests, found {len(missing)} "
            f"without one (first: {missing[:3]}) and {len(unknown)} of other requests (first: "
            f"{unknown[:3]}). Send the missing requests again."
        )
    return [found[i] for i in ids]


def _reply(row: Mapping[str, Any], where: str) -> str:
    if "reply" in row:
        return fields.any_text(row["reply"], f"{where}: reply")
    response = fields.required(row, "response", fields.mapping, where)
    body = fields.required(response, "body", fields.mapping, where)
    choices = fields.required(body, "choices", fields.list_of(fields.mapping), where)
    if not choices:
        raise DataError(f"{where}: expected a choice in the response, found none.")
    message = fields.required(choices[0], "message", fields.mapping, where)
    return fields.required(message, "content", fields.any_text, where)
