"""matplotlib figures as inline SVG, and the HTML frame of a chart around them.

A chart is drawn twice, for wide and for narrow places, and a container query shows the one that
fits: text keeps its size on a phone. Title, legend and axis labels are HTML, which the browser
wraps. Figures are made without pyplot. All text is escaped here or by matplotlib.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import importlib.resources
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from perception_jax.viz.formatting import Number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1f2126"
"""Colour of text and axes in the style, replaced by that of the page."""
LAYOUTS = {"wide": (720, 300), "narrow": (344, 240)}
"""Width and smallest height of the two drawings of a chart, pixels."""

_CSS = (
    "<style>"
    ".pj-chart{container-type:inline-size;max-width:760px;font-size:13px;line-height:1.45}"
    ".pj-chart svg{display:block;width:100%;height:auto;overflow:visible;stroke-linejoin:round}"
    ".pj-chart text{font-variant-numeric:tabular-nums}"
    ".pj-chart .pj-narrow{display:none}"
    "@container (max-width:540px){.pj-chart .pj-wide{display:none}"
    ".pj-chart .pj-narrow{display:block}}"
    ".pj-chart p{max-width:none;margin:0}.pj-chart .pj-title{font-weight:600;margin:0 0 .4em}"
    ".pj-axis{opacity:.72}.pj-x{text-align:right}"
    ".pj-chart ul{display:flex;flex-wrap:wrap;gap:.2em 1.2em;list-style:none;margin:0 0 .6em;"
    "padding:0}"
    ".pj-chart li{display:flex;align-items:center;gap:.45em;margin:0}"
    ".pj-line{flex:none;width:26px}"
    ".pj-area{fill:transparent}.pj-area:hover{fill:currentColor;fill-opacity:.07}"
    "</style>"
)


class Area(NamedTuple):
    """A rectangle of the drawing, pixels from the top left, with a tooltip."""

    left: Number
    top: Number
    width: Number
    height: Number
    text: str


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Applies the style sheet while a figure is made and saved, and nothing of the user's own."""
    import matplotlib

    sheet = importlib.resources.files("perception_jax.viz").joinpath("perception.mplstyle")
    with (
        importlib.resources.as_file(sheet) as path,
        matplotlib.rc_context(fname=path),
        warnings.catch_warnings(),
    ):
        # The reader's browser draws the text, in fonts that have what DejaVu Sans lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def new(width: Number, height: Number, layout: str | None = None) -> Figure:
    """An empty figure of this size in pixels; `layout` as matplotlib names it."""
    from matplotlib.figure import Figure

    return Figure((width / 72, height / 72), layout=layout)


def inline(
    figure: Figure, kind: str, title: str, description: str, areas: Sequence[Area] = ()
) -> str:
    """The figure as an `<svg>` element for a page: the same bytes for the same figure.

    Args:
      kind: "wide" or "narrow", for the frame.
      title, description: for screen readers.
      areas: parts that show a text under the pointer.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    # The first definitions are a style sheet that would apply to the whole page.
    body = buffer.getvalue().partition("</defs>")[2].rpartition("</svg>")[0]
    digest = hashlib.sha256(body.encode()).hexdigest()[:8]
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', body))

    def tidy(tag: re.Match) -> str:
        """Markup alone: what stands between tags is text and stays as it is."""
        markup = re.sub(r"\s+", " ", tag[0]).replace(INK, "currentColor")
        markup = re.sub(
            r' id="([^"]*)"', lambda m: f' id="{m[1]}-{digest}"' if m[1] in used else "", markup
        )
        markup = re.sub(r'(url\(#|href="#)([\w.-]+)', rf"\1\2-{digest}", markup)
        markup = re.sub(r' transform="rotate\(-0 [^"]*"| font-family: [^;"]*;', "", markup)
        return re.sub(r' [dxy]="[^"]*"', lambda m: re.sub(r"(\.\d)\d+", r"\1", m[0]), markup)

    body = re.sub(r">\s+<", "><", re.sub(r"<[^>]*>", tidy, body)).strip()
    if "<g " not in body:
        body = re.sub("</?g>", "", body)
    width, height = (round(72 * side) for side in figure.get_size_inches())
    said = description.replace("\n", ", ")
    rectangles = "".join(
        f'<rect class="pj-area" x="{area.left:.1f}" y="{area.top:.1f}" width="{area.width:.1f}" '
        f'height="{area.height:.1f}"><title>{html.escape(area.text)}</title></rect>'
        for area in areas
    )
    return (
        f'<svg class="pj-{kind}" viewBox="0 0 {width} {height}" role="img">'
        f"<title>{html.escape(title)}</title><desc>{html.escape(said)}</desc>"
        f"{body}{rectangles}</svg>"
    )


def frame(
    title: str,
    legend: Sequence[tuple[str, str]],
    drawings: str,
    *,
    x_label: str = "",
    y_label: str = "",
) -> str:
    """A chart: title, legend of (HTML sample, name), y label, drawings, x label."""
    items = "".join(f"<li>{sample}{html.escape(name)}</li>" for sample, name in legend)
    parts = [
        f'<div class="pj-chart">{_CSS}<p class="pj-title">{html.escape(title)}</p>',
        f"<ul>{items}</ul>" if items else "",
        f'<p class="pj-axis">{html.escape(y_label)}</p>' if y_label else "",
        drawings,
        f'<p class="pj-axis pj-x">{html.escape(x_label)}</p>' if x_label else "",
        "</div>",
    ]
    return "".join(parts)
