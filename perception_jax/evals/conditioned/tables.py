"""The scores as tables: as text, as Markdown, or for the HTML report.

Naming never stands without its copy floor, no value without its number of queries, and the column
of the paper's own numbers says that they could not be confirmed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from perception_jax.evals.conditioned.annotations import FREQUENCIES, STRATA
from perception_jax.evals.conditioned.report import Report

PAPER = "n/a (unconfirmed)"
NOTHING = "–"
"""Shown where there was no query."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a report, as text.

    Attributes:
      title: what is measured.
      header: names of the columns.
      rows: cells as text.
      note: how to read it.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """With the title as a heading; numbers are aligned right."""
        lines = [f"### {self.title}", ""]
        lines += [self.note, ""] if self.note else []
        rule = ["---" if k < 2 else "---:" for k in range(len(self.header))]
        lines += [f"| {' | '.join(cells)} |" for cells in (self.header, rule, *self.rows)]
        return "\n".join(lines) + "\n"

    def text(self) -> str:
        """For a terminal."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            shown = [
                cell.ljust(width) if k < 2 else cell.rjust(width)
                for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            return "  ".join(shown).rstrip()

        note = [self.note] if self.note else []
        return "\n".join([self.title, *note, *map(line, (self.header, *self.rows))]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Arguments of `viz.Report.add_table`."""
        caption = f"{self.title}. {self.note}" if self.note else self.title
        return {"header": self.header, "rows": self.rows, "caption": caption}


def tables(report: Report) -> list[Table]:
    """All of a report's tables, in the order in which they are to be read."""
    found = [naming_table(report), candidate_table(report)]
    staged = report.two_stage or {}
    note = "Blank: the query image, or every gallery image of a text query, has one colour."
    for title, part, more in (
        ("Text to image", report.text_to_image, staged.get("text_to_image")),
        ("Image to text", report.image_to_text, None),
        ("Image to image", report.image_to_image, staged.get("image_to_image")),
    ):
        if part is not None:
            systems = {"steered": part["conditioned"], "static": part["static"]}
            if more is not None:
                systems |= {f"two-stage, top {staged['top']}": more}
            found.append(_table(title, systems | {"blank": part["blank"]}, note=note))
    return [*found, diagnostics_table(report)]


def naming_table(report: Report) -> Table:
    """Accuracy of naming what the instruction names, beside its copy floor."""
    part = report.p_protocol
    systems = {"steered": "conditioned", "copy floor": "copy_floor", "static": "static"}
    note = (
        "The instruction names the answer. Only what exceeds the copy floor, the same with an "
        "image of one colour, comes from the image."
    )
    columns = {title: part[system] for title, system in systems.items()}
    return _table("Named-instruction accuracy (P-protocol)", columns, note=note)


def candidate_table(report: Report) -> Table:
    """Deciding for each evaluated class of each image."""
    titles = {"presence logit": "presence", "calibrated cosine": "calibrated_cosine"}
    columns = {title: report.l_protocol[name] for title, name in titles.items()}
    columns |= {key: part for key, part in report.l_protocol.items() if key in ("static", "blank")}
    return _table("Candidate-conditioned classification (L-protocol)", columns)


def diagnostics_table(report: Report) -> Table:
    """Cosines with the class prototype; how well presence logits, the cosine without an
    instruction, and a blank image's presence logits tell present from absent."""
    found, pairs = report.diagnostics, report.num_pairs
    names = {"steered": "oid_auc", "static": "static_auc", "blank": "blank_auc"}
    systems = {title: name for title, name in names.items() if name in found}
    none = [NOTHING] * (len(systems) - 1)
    rows = [
        ("all", f"cosine, {kind}", str(count), _plain(found[f"cosine_{kind}"]), *none, PAPER)
        for kind, count in (
            ("present", pairs["all"]),
            ("absent", found["n_absent"]),
            ("blank", pairs["all"]),
        )
    ]
    rows += [
        (
            stratum,
            "AUC, present against absent",
            f"{pairs[stratum]} / {found['n_absent']}",
            *(_plain(found[name][stratum]) for name in systems.values()),
            PAPER,
        )
        for stratum in STRATA
    ]
    header = ("stratum", "metric", "n", *systems, "paper")
    return Table(title="Copy diagnostics", header=header, rows=tuple(rows))


_SHOWN = {
    "map": ("mAP", "n_map"),
    **{f"map_{f}": (f"mAP, {f}", f"n_map_{f}") for f in FREQUENCIES},
    "hit@1": ("Hit@1", "n_images"),
    "r_precision": ("R-precision", "n_images"),
    "same_class_r@1": ("R@1 in class", "n_same_class"),
}
"""Name of each metric and where its number of queries stands; those at a rank are further ones."""
_AT_RANK = {"acc": "Acc", "r": "R"}


def _shown(metric: str) -> tuple[str, str] | None:
    kind, at, rank = metric.partition("@")
    return (f"{_AT_RANK[kind]}@{rank}", "n") if at and kind in _AT_RANK else _SHOWN.get(metric)


def _table(title: str, systems: Mapping[str, Mapping[str, Any]], *, note: str = "") -> Table:
    first = next(iter(systems.values()))
    rows = []
    for stratum in STRATA:
        for metric in (m for m in first[stratum] if _shown(m)):
            name, count = _shown(metric)
            values = [_percent(part[stratum][metric]) for part in systems.values()]
            rows.append((stratum, name, str(first[stratum][count]), *values, PAPER))
    header = ("stratum", "metric", "n", *systems, "paper")
    return Table(title=title, header=header, rows=tuple(rows), note=note)


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}"


def _plain(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"
