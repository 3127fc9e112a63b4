"""The report of a contrastive model: one self-contained page."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from perception_jax.data.images import decode
from perception_jax.data.records import Record
from perception_jax.evals.intervals import wilson_interval
from perception_jax.evals.ranking import nearest
from perception_jax.evals.retrieval import RetrievalScores
from perception_jax.evals.zero_shot import ZeroShotScores
from perception_jax.nn import maps
from perception_jax.ops.image import normalise
from perception_jax.systems.contrastive.benchmark import Benchmark
from perception_jax.systems.contrastive.evaluate import TEMPLATES, Matching, Naming
from perception_jax.viz import Bar, Metric, Report, bar_chart, heatmap, line_chart

EXAMPLES = 24
"""Named drawings shown, half of them right ones."""
QUERIES = 6
NEIGHBOURS = 5
ENLARGE = 3
"""Small images are shown this much larger, pixel by pixel."""


TITLES = {"naming": "Naming", "held_out": "Naming new concepts"}
MATCHING_TITLES = {"naming": "Matching", "held_out": "Matching new concepts"}
CURVES = {"naming": TITLES["naming"], "held_out_matching": MATCHING_TITLES["held_out"]}
MEANINGS = {
    "naming": "The right name ranks first among all training names.",
    "held_out": "Neither the drawing nor its name was trained on: what words share with others.",
}
MATCHING_MEANINGS = {
    "naming": "The closest drawing by other artists shows the same thing.",
    "held_out": "The same for things that no training image shows.",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Findings:
    """All that the report says in numbers.

    Attributes:
      naming: zero-shot scores by kind, as in `Benchmark.naming`.
      matching, nearest_pixel: per kind, {"top1", "top5"} of recognising by the closest drawing,
        by the model's embeddings and by pixels.
      retrieval: of images and captions.
    """

    naming: Mapping[str, ZeroShotScores]
    matching: Mapping[str, Mapping[str, float]]
    nearest_pixel: Mapping[str, Mapping[str, float]]
    retrieval: RetrievalScores

    def numbers(self) -> dict[str, float]:
        """Flat, for a JSON file."""
        found: dict[str, float] = {}
        for name, scores in self.naming.items():
            found |= {
                f"{name}/names": len(scores.per_class),
                f"{name}/images": scores.count,
                f"{name}/top1": scores.top1,
                f"{name}/top5": scores.top5,
                f"{name}/chance_top1": scores.chance_top1,
                f"{name}/chance_top5": scores.chance_top5,
                **{f"{name}/matching_{k}": v for k, v in self.matching[name].items()},
                **{f"{name}/nearest_pixel_{k}": v for k, v in self.nearest_pixel[name].items()},
            }
        for name in ("image_to_text", "text_to_image"):
            one = getattr(self.retrieval, name)
            found |= {f"retrieval/{name}_r{k}": one.recall[k] for k in (1, 5, 10)}
            found |= {f"retrieval/{name}_chance_r{k}": one.chance_recall[k] for k in (1, 5, 10)}
        return found


def evaluate(model: nnx.Module, benchmark: Benchmark) -> Findings:
    """Runs the whole benchmark with its baselines."""
    return Findings(
        naming={name: one.scores(model) for name, one in benchmark.naming.items()},
        matching={name: one(model) for name, one in benchmark.matching.items()},
        nearest_pixel={name: one.by_pixels() for name, one in benchmark.matching.items()},
        retrieval=benchmark.retrieval.scores(model),
    )


def write(
    path: pathlib.Path,
    *,
    model: nnx.Module,
    benchmark: Benchmark,
    findings: Findings,
    history: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    title: str,
    subtitle: str,
) -> pathlib.Path:
    """Writes the page.

    Args:
      history: rows of `metrics.jsonl`; may be empty for a model trained elsewhere.
      config: the resolved settings, shown at the end.

    Raises:
      PerceptionError: the file cannot be written.
    """
    report = Report(title, subtitle)
    _add_metrics(report, findings)
    _add_curves(report, history, findings)
    if "naming" in benchmark.naming:
        _add_named(report, benchmark.naming["naming"], findings.naming["naming"])
        _add_neighbours(report, model, benchmark.matching["naming"])
    _add_captions(report, model, benchmark)
    _add_maps(report, model, benchmark)
    report.add_section("How this was made", "The whole configuration, for running it again.")
    report.add_details(config)
    return report.write(path)


def _add_metrics(report: Report, findings: Findings) -> None:
    report.add_section("What it can do")
    rows = []
    for name, scores in findings.naming.items():
        for k in (1, 5):
            rows.append(
                Metric(
                    name=f"{TITLES[name]}: top-{k} of {len(scores.per_class)}",
                    value=getattr(scores, f"top{k}"),
                    interval=getattr(scores, f"top{k}_interval"),
                    baselines={
                        "chance": getattr(scores, f"chance_top{k}"),
                        "nearest pixels": findings.nearest_pixel[name][f"top{k}"],
                    },
                    meaning=MEANINGS[name] if k == 1 else "The right name is in the first five.",
                )
            )
    rows += [
        _matching_row(findings, name, k) for name in findings.matching for k in ("top1", "top5")
    ]
    for name, title in (
        ("image_to_text", "Image to caption"),
        ("text_to_image", "Caption to image"),
    ):
        one = getattr(findings.retrieval, name)
        rows.append(
            Metric(
                name=f"{title}: recall@5 of {one.queries}",
                value=one.recall[5],
                interval=one.recall_interval[5],
                baselines={"chance": one.chance_recall[5]},
                meaning="Held-out images, each with its own caption.",
            )
        )
    report.add_metrics(rows)
    if findings.naming:
        report.add_text(
            "“Nearest pixels” names a drawing by the most similar picture among all training "
            "artists' drawings of the same names. Matching does that with the model's own "
            "embeddings, so it is fair where nobody ever read the name."
        )


def _matching_row(findings: Findings, name: str, k: str) -> Metric:
    images, rate = findings.naming[name].count, findings.matching[name][k]
    return Metric(
        name=f"{MATCHING_TITLES[name]}: top-{k[3:]} of {len(findings.naming[name].per_class)}",
        value=rate,
        interval=wilson_interval(round(rate * images), images),
        baselines={
            "chance": getattr(findings.naming[name], f"chance_{k}"),
            "nearest pixels": findings.nearest_pixel[name][k],
        },
        meaning=MATCHING_MEANINGS[name] if k == "top1" else "It is among the five closest things.",
    )


def _add_curves(report: Report, history: Sequence[Mapping[str, Any]], findings: Findings) -> None:
    trained = [row for row in history if "loss" in row]
    if trained:
        report.add_section("How it learned")
        steps = [row["step"] for row in trained]
        report.add_chart(
            line_chart(
                {"training loss": (steps, [row["loss"] for row in trained])},
                "Contrastive loss in training",
                x_label="step",
                y_label="nats",
            )
        )
    series = {}
    for name, title in CURVES.items():
        key = f"evaluate/{name}/top1"
        rows = [row for row in history if key in row]
        if len(rows) > 1:
            series[title] = [row["step"] for row in rows], [row[key] for row in rows]
    if series:
        title = "The unseen artist's drawings while it trained"
        report.add_chart(line_chart(series, title, x_label="step", y_label="top-1", percent=True))
    bars = [
        Bar(
            TITLES[name],
            scores.top1,
            baselines={
                "chance": scores.chance_top1,
                "nearest pixels": findings.nearest_pixel[name]["top1"],
            },
            interval=scores.top1_interval,
        )
        for name, scores in findings.naming.items()
    ]
    if bars:
        report.add_chart(bar_chart({"": bars}, "Top-1 against the baselines", percent=True))


def _add_named(report: Report, naming: Naming, scores: ZeroShotScores) -> None:
    report.add_section(
        "Right and wrong", "Drawings of the unseen artist with the name the model gives them."
    )
    images = naming.images
    rng = np.random.default_rng(0)
    cards = []
    for wanted in (True, False):
        found = rng.permutation(np.flatnonzero(scores.correct == wanted))[: EXAMPLES // 2]
        for index in found:
            name = images.names[images.labels[index]]
            said = images.names[scores.predictions[index]]
            text = name if wanted else f"{said} — it is: {name}"
            cards.append((_enlarged(images.pixels[index]), text, "ok" if wanted else "wrong"))
    report.add_images(cards, width=110)


def _add_neighbours(report: Report, model: nnx.Module, matching: Matching) -> None:
    report.add_section(
        "Nearest neighbours",
        "A drawing of the unseen artist, and the training artists' drawings that lie closest.",
    )
    queries, gallery, encoder = matching.images, matching.gallery, matching.encoder
    chosen = np.random.default_rng(1).permutation(len(queries.labels))[:QUERIES]
    found = nearest(
        encoder.images(model, queries.pixels[chosen]),
        encoder.images(model, gallery.pixels),
        NEIGHBOURS,
    )
    rows = []
    for query, neighbours in zip(chosen, found.indices, strict=True):
        label = queries.labels[query]
        row = [(_enlarged(queries.pixels[query]), queries.names[label])]
        for index in neighbours:
            status = "ok" if gallery.labels[index] == label else "wrong"
            name = gallery.names[gallery.labels[index]]
            row.append((_enlarged(gallery.pixels[index]), name, status))
        rows.append(row)
    report.add_image_rows(rows)


def _add_captions(report: Report, model: nnx.Module, benchmark: Benchmark) -> None:
    report.add_section("Captions", "Images with the caption that the model finds closest.")
    images = benchmark.retrieval.images
    found, texts = benchmark.retrieval.embeddings(model)
    chosen = np.random.default_rng(2).permutation(len(images.captions))[: EXAMPLES // 2]
    best = nearest(found[chosen], texts, 1).indices[:, 0]
    cards = []
    for index, text in zip(chosen, best, strict=True):
        said, own = images.texts[text], images.captions[index]
        right = said == own
        caption = own if right else f"{said} — its own: {own}"
        cards.append((_enlarged(images.pixels[index]), caption, "ok" if right else "wrong"))
    report.add_images(cards, width=170)


def _add_maps(report: Report, model: nnx.Module, benchmark: Benchmark) -> None:
    report.add_section(
        "Where it looks",
        "Attention of the class token in the last layer, and the patches that speak for a text "
        "(attention × gradient).",
    )
    encoder, records = benchmark.encoder, benchmark.pictures
    pixels = np.stack(
        [encoder.processor(decode(record.image, name=record.id)).pixels for record in records]
    )
    normal = normalise(jnp.asarray(pixels), encoder.processor.mean, encoder.processor.std)
    attention = np.asarray(jax.jit(lambda m, x: maps.class_attention(m.vision, x))(model, normal))
    relevance = jax.jit(lambda m, x, t: maps.text_relevance(m.vision, x, t))
    texts = [_texts_of(record) for record in records]
    columns = [
        np.asarray(relevance(model, normal, jnp.asarray(encoder.texts(model, column))))
        for column in zip(*texts, strict=True)
    ]
    rows = []
    for k, image in enumerate(_enlarged(picture) for picture in pixels):
        row = [(image, records[k].captions[0]), (heatmap(image, attention[k]), "attention")]
        for column, text in zip(columns, texts[k], strict=True):
            row.append((heatmap(image, column[k]), text))
        rows.append(row)
    report.add_image_rows(rows, width=150)


def _texts_of(record: Record) -> tuple[str, str]:
    """Two texts to look for: things in the picture where it shows two, else its captions."""
    names = list(dict.fromkeys(item.name for item in record.objects))
    if len(names) >= 2:
        return tuple(TEMPLATES[0].format(name) for name in names[:2])
    return (record.captions[0], record.captions[-1])


def _enlarged(image: np.ndarray) -> np.ndarray:
    return image.repeat(ENLARGE, axis=0).repeat(ENLARGE, axis=1)
