"""A report as one self-contained HTML file.

Images are embedded, styles are inline, there is no script, and the page's own content policy
forbids the browser to load anything else. All text is escaped.

    report = Report("Small CLIP on scenes", "2,000 steps on two cores")
    report.add_section("Zero-shot naming", "Drawings of an artist the model never saw.")
    report.add_metrics([Metric(name="top-1", value=0.41, baselines={"chance": 0.003})])
    report.write("report.html")
"""

from __future__ import annotations

import dataclasses
import html
import importlib.resources
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from perception_jax.errors import PerceptionError
from perception_jax.files import write_whole
from perception_jax.viz import blocks
from perception_jax.viz.blocks import Metric

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"


@dataclasses.dataclass
class _Section:
    title: str
    anchor: str
    parts: list[str] = dataclasses.field(default_factory=list)


class Report:
    """Collects parts in order and writes them as one page.

    Parts go to the section that was added last; parts added before any section stand under the
    title. Captions, introductions and texts show `backticks` as code.
    """

    def __init__(self, title: str, subtitle: str = ""):
        self._title, self._subtitle = title, subtitle
        self._sections = [_Section("", "")]

    def _add(self, part: str) -> None:
        self._sections[-1].parts.append(part)

    def add_section(self, title: str, intro: str = "") -> None:
        """Starts a section, listed in the contents, with one sentence on what it shows."""
        taken = {section.anchor for section in self._sections}
        stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        anchor, number = stem, 2
        while anchor in taken:
            anchor, number = f"{stem}-{number}", number + 1
        self._sections.append(_Section(title, anchor))
        if intro:
            self._add(f'<p class="intro">{blocks.inline(intro)}</p>')

    def add_text(self, text: str) -> None:
        """Adds paragraphs; blank lines separate them."""
        self._add(blocks.prose(text))

    def add_metrics(self, rows: Sequence[Metric]) -> None:
        """Adds measured values, each with its baselines and what it means."""
        self._add(blocks.metrics(rows))

    def add_chart(self, chart: str, caption: str = "") -> None:
        """Adds the HTML of `line_chart`, `bar_chart` or `heat_table`; it is not escaped."""
        self._add(blocks.figure(chart, caption))

    def add_images(self, images: Sequence[tuple], *, caption: str = "", width: int = 150) -> None:
        """Adds image cards in as many columns as fit.

        Args:
          images: `ImageCard`s or tuples `(uint8[H, W, 3], caption, status)`; status is "ok",
            "wrong" or None, caption and status may be left out.
          caption: a sentence below all of them.
          width: smallest card width in CSS pixels; larger images are stored at twice this.

        Raises:
          DataError: an image is not uint8[H, W, 3] or a status is unknown.
        """
        self._add(blocks.image_cards(images, caption, width))

    def add_image_rows(
        self, rows: Sequence[Sequence[tuple]], *, caption: str = "", width: int = 120
    ) -> None:
        """Adds rows of images that belong together: a query and its neighbours, an image and maps.

        A row never wraps: its cards shrink, and where that is not enough it scrolls.

        Args:
          rows: each a sequence as in `add_images`; its first image is set apart and stays in view.
          caption: a sentence below all of them.
          width: largest card width in CSS pixels; larger images are stored at twice this.

        Raises:
          DataError: an image is not uint8[H, W, 3] or a status is unknown.
        """
        self._add(blocks.image_rows(rows, caption, width))

    def add_table(
        self, header: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str = ""
    ) -> None:
        """Adds a table; columns of numbers are aligned right.

        Raises:
          DataError: a row has more or fewer cells than the header.
        """
        self._add(blocks.table(header, rows, caption))

    def add_details(self, config: Mapping[str, Any], *, summary: str = "Configuration") -> None:
        """Adds a folded block of settings as JSON; values JSON does not know appear as text."""
        body = json.dumps(config, indent=2, ensure_ascii=False, default=str)
        self._add(
            f"<details><summary>{html.escape(summary)}</summary>"
            f"<pre>{html.escape(body)}</pre></details>"
        )

    def html(self) -> str:
        """The whole page."""
        named = [section for section in self._sections if section.title]
        links = "".join(f'<li><a href="#{s.anchor}">{html.escape(s.title)}</a></li>' for s in named)
        contents = f'<nav aria-label="Contents"><ol>{links}</ol></nav>' if named else ""
        subtitle = (
            f'<p class="subtitle">{blocks.inline(self._subtitle)}</p>' if self._subtitle else ""
        )
        style = importlib.resources.files("perception_jax.viz").joinpath("assets/report.css")
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self._title)}</title>\n"
            '<link rel="icon" href="data:,">\n'
            f"<style>\n{style.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
            f'<div class="page">\n<header><h1>{html.escape(self._title)}</h1>{subtitle}</header>\n'
            f"{contents}\n<main>\n{''.join(map(_section, self._sections))}</main>\n</div>\n"
            "</body>\n</html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Writes the page; the file is replaced atomically.

        Raises:
          PerceptionError: the file cannot be written.
        """
        path = pathlib.Path(path)
        page = self.html()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, page.encode(errors="replace"))
        except OSError as error:
            raise PerceptionError(
                f"expected to write the report to {path}, found {error}; check the path, the free "
                "space and the permissions of its folder"
            ) from error
        return path


def _section(section: _Section) -> str:
    if not section.parts and not section.title:
        return ""
    heading = f"<h2>{html.escape(section.title)}</h2>" if section.title else ""
    anchor = f' id="{section.anchor}"' if section.anchor else ""
    return f"<section{anchor}>{heading}{''.join(section.parts)}</section>\n"
