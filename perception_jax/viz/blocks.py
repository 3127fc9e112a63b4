"""HTML parts of a report: metrics, images, tables. All text is escaped.

Kept apart from `report`, which only orders them into a page.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Real
from PIL import Image

from perception_jax.errors import DataError
from perception_jax.viz import colormap
from perception_jax.viz.formatting import Number, format_number
from perception_jax.viz.overlay import check_image

Status = Literal["ok", "wrong"]
"""Whether an image shows a right or wrong answer."""

_BADGES = {
    "ok": ("right", "M2 8.5l4 4 8-9"),
    "wrong": ("wrong", "M3 3l10 10M13 3L3 13"),
}


class ImageCard(NamedTuple):
    """An image (uint8[H, W, 3]) with a caption and a status."""

    image: np.ndarray
    caption: str = ""
    status: Status | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A measured value with its baselines.

    Attributes:
      name: what was measured.
      value: the number.
      baselines: reference values by name, e.g. {"chance": 0.003}.
      meaning: one sentence for a reader who does not know the metric.
      interval: confidence interval (low, high).
      percent: value and baselines are fractions, shown as percentages on a scale from 0 to 100.
    """

    name: str
    value: Number
    baselines: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    meaning: str = ""
    interval: tuple[Number, Number] | None = None
    percent: bool = True


def prose(text: str) -> str:
    """Paragraphs split at blank lines; `backticks` become code."""
    paragraphs = (p.strip() for p in re.split(r"\n\s*\n", text))
    return "".join(f"<p>{inline(p)}</p>" for p in paragraphs if p)


def inline(text: str) -> str:
    """Escaped text with `backticks` as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def metrics(rows: Sequence[Metric]) -> str:
    """A list of values, each with its meaning, a scale and its baselines."""
    return f'<dl class="metrics">{"".join(map(_metric, rows))}</dl>'


def _metric(row: Metric) -> str:
    def shown(value: Number) -> str:
        return format_number(float(value), percent=row.percent)

    interval = ""
    if row.interval is not None:
        low, high = row.interval
        interval = f" <small>{shown(low)} – {shown(high)}</small>"
    parts = [
        f'<div class="metric"><dt>{html.escape(row.name)}</dt>',
        f'<dd class="value">{shown(row.value)}{interval}</dd>',
        f'<dd class="meaning">{inline(row.meaning)}</dd>' if row.meaning else "",
    ]
    if row.baselines:
        items = "".join(
            f"<li>{html.escape(name)} {shown(value)}</li>" for name, value in row.baselines.items()
        )
        parts.append(f'<dd class="against">{_scale(row, shown)}<ul>{items}</ul></dd>')
    return "".join(parts) + "</div>"


def _scale(row: Metric, shown: Callable[[Number], str]) -> str:
    """The value as a bar with the baselines as ticks; "" where a bar from zero means nothing."""
    values = np.array([row.value, *row.baselines.values()], np.float64)
    if not np.isfinite(values).all() or values.min() < 0:
        return ""
    full = max(1.0 if row.percent else 0.0, float(values.max())) or 1.0
    ticks = "".join(
        f'<span class="tick" style="left:{100 * v / full:.2f}%" '
        f'title="{html.escape(name)} {shown(v)}"></span>'
        for name, v in row.baselines.items()
    )
    fill = f'<span class="fill" style="width:{100 * row.value / full:.2f}%"></span>'
    return f'<div class="scale" aria-hidden="true">{fill}{ticks}</div>'


def encode_image(image: np.ndarray, display: int, where: str) -> tuple[str, int, int]:
    """A data URI, with the image scaled down to twice its display width, and its new size.

    Small images are stored exactly, larger ones as lossy WebP.

    Raises:
      DataError: not a non-empty uint8[H, W, 3].
    """
    check_image(image, where)
    picture = Image.fromarray(image)
    limit = 2 * display
    if picture.width > limit:
        size = (limit, max(1, round(picture.height * limit / picture.width)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    small = picture.width * picture.height <= 128 * 128
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=small, quality=86, method=4)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/webp;base64,{data}", picture.width, picture.height


def _card(card: ImageCard, display: int, where: str, extra_class: str = "") -> str:
    if card.status not in (None, *_BADGES):
        raise DataError(
            f"expected the status 'ok', 'wrong' or None, found {card.status!r} in {where}"
        )
    uri, width, height = encode_image(card.image, display, where)
    kind = ' class="pixels"' if 2 * width <= display else ""
    badge = ""
    if card.status is not None:
        word, path = _BADGES[card.status]
        badge = (
            '<span class="badge"><svg viewBox="0 0 16 16" aria-hidden="true"><path '
            f'd="{path}" fill="none" stroke="currentColor" stroke-width="2.4"/></svg>{word}</span>'
        )
    classes = " ".join(c for c in ("card", card.status or "", extra_class) if c)
    alt = html.escape(card.caption or "image", quote=True)
    return (
        f'<li class="{classes}"><img src="{uri}" width="{width}" height="{height}" alt="{alt}" '
        f'loading="lazy"{kind}><div class="note">{badge}{html.escape(card.caption)}</div></li>'
    )


def image_cards(cards: Sequence[tuple], caption: str, width: int) -> str:
    """Cards in as many columns as fit."""
    items = "".join(
        _card(ImageCard(*card), width, f"image {k} of add_images") for k, card in enumerate(cards)
    )
    # Small cards stay two abreast on a phone; large ones take its whole width.
    kind = "cards large" if width > 200 else "cards"
    return figure(f'<ul class="{kind}" style="--card:{width}px">{items}</ul>', caption)


def image_rows(rows: Sequence[Sequence[tuple]], caption: str, width: int) -> str:
    """Rows of images that belong together, the first of each set apart; a row never wraps."""
    strips = []
    for r, row in enumerate(rows):
        items = "".join(
            _card(
                ImageCard(*card),
                width,
                f"row {r}, image {k} of add_image_rows",
                extra_class="" if k else "lead",
            )
            for k, card in enumerate(row)
        )
        strip = f'<ul class="strip" style="--card:{width}px">{items}</ul>'
        strips.append(_scrolling(strip, caption or "images", "row"))
    return figure("".join(strips), caption)


def figure(markup: str, caption: str) -> str:
    """Finished markup with a caption below it, if there is one."""
    below = f"<figcaption>{inline(caption)}</figcaption>" if caption else ""
    return f"<figure>{markup}{below}</figure>"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> str:
    """A table; columns of numbers are aligned right, numbers shortened to four digits.

    Raises:
      DataError: a row has more or fewer cells than the header.
    """
    for k, row in enumerate(rows):
        if len(row) != len(header):
            raise DataError(
                f"expected {len(header)} cells as in the header {list(header)}, found {len(row)} "
                f"in row {k} of add_table"
            )
    numeric = [bool(rows) and all(_is_number(row[k]) for row in rows) for k in range(len(header))]
    head = "".join(
        f'<th scope="col"{_align(name, flag)}>{html.escape(name)}</th>'
        for name, flag in zip(header, numeric, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(_cell(c, flag) for c, flag in zip(row, numeric, strict=True))}</tr>"
        for row in rows
    )
    return _scrolling_table("", caption, head, body)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def _align(text: str, numeric: bool) -> str:
    # A long text gets room to wrap well; the table then scrolls in its frame where it must.
    kind = "number" if numeric else "long" if len(text) > 28 else ""
    return f' class="{kind}"' if kind else ""


def _cell(value: Any, numeric: bool) -> str:
    text = _shown(value)
    return f"<td{_align(text, numeric)}>{inline(text)}</td>"


def _shown(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if isinstance(value, numbers.Real):
        return format_number(float(value))
    return str(value)


def heat_table(
    values: Real[np.ndarray, "r c"],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    *,
    percent: bool = False,
    numbered: bool = True,
) -> str:
    """A matrix as a table whose cells are tinted by value; NaN cells stay empty.

    Args:
      values: finite, or NaN.
      rows, columns: names.
      title: what it shows.
      percent: values are fractions and shown as percentages.
      numbered: whether cells hold their number. Otherwise, for large matrices, cells are small and
        columns named vertically, numbers appear under the pointer, and the tint follows the square
        root, so that small values are seen too.

    Raises:
      DataError: the names do not fit the matrix.
    """
    if values.shape != (len(rows), len(columns)):
        raise DataError(
            f"expected a matrix of {len(rows)} x {len(columns)} as named, found "
            f"{values.shape} in heat_table {title!r}"
        )
    values = np.asarray(values, np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    red, green, blue = colormap.categorical(0)

    def cell(value: Number) -> str:
        if not np.isfinite(value):
            return "<td></td>"
        # Up to 0.4 opaque: text keeps a contrast above 4.5:1 in both themes.
        strength = (value - low) / ((high - low) or 1.0)
        strength = 0.4 * strength if numbered else strength**0.5
        tint = f"background:rgb({red} {green} {blue}/{strength:.2f})"
        shown = format_number(float(value), percent=percent)
        if numbered:
            return f'<td style="{tint}">{shown}</td>'
        return f'<td style="{tint}" title="{shown}"></td>'

    head = "<td></td>" + "".join(f'<th scope="col">{html.escape(c)}</th>' for c in columns)
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>{"".join(map(cell, line))}</tr>'
        for name, line in zip(rows, values, strict=True)
    )
    return _scrolling_table("heat" if numbered else "heat fine", title, head, body)


def _scrolling_table(kind: str, caption: str, head: str, body: str) -> str:
    label = f"<caption>{inline(caption)}</caption>" if caption else ""
    kind = f' class="{kind}"' if kind else ""
    markup = f"<table{kind}>{label}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return _scrolling(markup, caption or "table", "scroll")


def _scrolling(markup: str, name: str, kind: str) -> str:
    """Puts wide markup into a frame that scrolls, reachable by keyboard, with a name."""
    name = html.escape(name)
    return f'<div class="{kind}" tabindex="0" role="region" aria-label="{name}">{markup}</div>'
