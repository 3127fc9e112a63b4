"""The scores as tables: as text, as Markdown, or for the HTML results.

Naming never stands without its copy floor, no value without its number of queries, and the column
of the paper's own numbers says that they could not be confirmed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from perception_jax.evals.conditioned.annotations import FREQUENCIES, STRATA
from perception_jax.evals.conditioned.results import ConditionedResults, count_name

PAPER = "n/a (unconfirmed)"
NOTHING = "–"
"""Shown where there was no query."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a report; all cells are text.

    Attributes:
      title: what is measured.
      header: names of the columns.
      rows: cells of each row.
      note: how to read it.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Arguments of `viz.Report.add_table`."""
        caption = f"{self.title}. {self.note}" if self.note else self.title
        return {"header": self.header, "rows": self.rows, "caption": caption}


def tables(results: ConditionedResults) -> list[Table]:
    """All tables of an evaluation, in the order in which they are to be read."""
    found = [_naming_table(results), _candidate_table(results)]
    staged = results.two_stage or {}
    note = "Blank: the query image, or every gallery image of a text query, has one colour."
    for title, part, more in (
        ("Text to image", results.text_to_image, staged.get("text_to_image")),
        ("Image to text", results.image_to_text, None),
        ("Image to image", results.image_to_image, staged.get("image_to_image")),
    ):
        if part is not None:
            systems = {"steered": part["conditioned"], "static": part["static"]}
            if more is not None:
                systems |= {f"two-stage, top {staged['top']}": more}
            found.append(_table(title, systems | {"blank": part["blank"]}, note=note))
    return [*found, _diagnostics_table(results)]


def _naming_table(results: ConditionedResults) -> Table:
    """Accuracy of naming what the instruction names, beside its copy floor."""
    part = results.p_protocol
    systems = {"steered": "conditioned", "copy floor": "copy_floor", "static": "static"}
    note = (
        "The instruction names the answer. Only what exceeds the copy floor, the same with an "
        "image of one colour, comes from the image."
    )
    columns = {title: part[system] for title, system in systems.items()}
    return _table("Named-instruction accuracy (P-protocol)", columns, note=note)


def _candidate_table(results: ConditionedResults) -> Table:
    """Deciding for each evaluated class of each image."""
    titles = {"presence logit": "presence", "calibrated cosine": "calibrated_cosine"}
    columns = {title: results.l_protocol[name] for title, name in titles.items()}
    columns |= {key: part for key, part in results.l_protocol.items() if key in ("static", "blank")}
    return _table("Candidate-conditioned classification (L-protocol)", columns)


def _diagnostics_table(results: ConditionedResults) -> Table:
    """Cosines with the class prototype; how well presence logits, the cosine without an
    instruction, and a blank image's presence logits tell present from absent."""
    found, pairs = results.diagnostics, results.num_pairs
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
    "map": "mAP",
    **{f"map_{frequency}": f"mAP, {frequency}" for frequency in FREQUENCIES},
    "hit@1": "Hit@1",
    "r_precision": "R-precision",
    "same_class_r@1": "R@1 in class",
}
"""Name of each metric; those at a rank are further ones."""
_AT_RANK = {"acc": "Acc", "r": "R"}


def _shown(metric: str) -> str | None:
    kind, at, rank = metric.partition("@")
    return f"{_AT_RANK[kind]}@{rank}" if at and kind in _AT_RANK else _SHOWN.get(metric)


def _table(title: str, systems: Mapping[str, Mapping[str, Any]], *, note: str = "") -> Table:
    first = next(iter(systems.values()))
    rows = []
    for stratum in STRATA:
        for metric, name in ((m, _shown(m)) for m in first[stratum] if _shown(m)):
            count = first[stratum][count_name(metric)]
            values = [_percent(part[stratum][metric]) for part in systems.values()]
            rows.append((stratum, name, str(count), *values, PAPER))
    header = ("stratum", "metric", "n", *systems, "paper")
    return Table(title=title, header=header, rows=tuple(rows), note=note)


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f}"


def _plain(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"
