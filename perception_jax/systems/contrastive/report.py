"""The report of a contrastive model: one self-contained page."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from perception_jax.data.images import decode
from perception_jax.data.records import Record
from perception_jax.evals.intervals import wilson_interval
from perception_jax.evals.ranking import nearest
from perception_jax.evals.zero_shot import RetrievalScores, ZeroShotScores
from perception_jax.nn import maps
from perception_jax.ops.image import normalise
from perception_jax.systems.contrastive.benchmark import Benchmark
from perception_jax.systems.contrastive.encode import Embeddings, take
from perception_jax.systems.contrastive.evaluate import TEMPLATES, Matching, Naming, Retrieval
from perception_jax.viz import Bar, Metric, Report, bar_chart, heatmap, sections

EXAMPLES = 24
"""Number of examples shown, half of them right."""
QUERIES = 6
"""Number of drawings shown with their nearest neighbours."""
NEIGHBOURS = 5
"""Number of nearest neighbours of each."""
ENLARGE = 3
"""Factor by which small images are enlarged, without interpolation."""

_TITLES = {"naming": "Naming", "held_out": "Naming new concepts"}
_MATCHING_TITLES = {"naming": "Matching", "held_out": "Matching new concepts"}
_CURVES = {
    "evaluate/naming/top1": _TITLES["naming"],
    "evaluate/held_out_matching/top1": _MATCHING_TITLES["held_out"],
}
_DIRECTIONS = {"image_to_text": "Image to caption", "text_to_image": "Caption to image"}
_MEANINGS = {
    "naming": "The right name ranks first among all training names.",
    "held_out": "Neither the drawing nor its name is in the training data; only the words of the "
    "name occur in others.",
}
_MATCHING_MEANINGS = {
    "naming": "The closest drawing by other artists shows the same concept.",
    "held_out": "The same for concepts that no training image shows.",
}


@dataclasses.dataclass(frozen=True, eq=False)
class BenchmarkScores:
    """All scores of the benchmark.

    Attributes:
      naming: zero-shot scores by test set, as in `Benchmark.naming`.
      matching, nearest_pixel: by test set, {"top1", "top5"} of classification by the closest
        drawing, in the model's embedding space and in pixels.
      retrieval: of images and captions.
      pairs: share of minimal pairs that are right, by visual pattern; may be empty.
    """

    naming: Mapping[str, ZeroShotScores]
    matching: Mapping[str, Mapping[str, float]]
    nearest_pixel: Mapping[str, Mapping[str, float]]
    retrieval: RetrievalScores
    pairs: Mapping[str, float]

    def numbers(self) -> dict[str, float]:
        """The scores by flat name, for `results.json`."""
        found: dict[str, float] = {}
        for name, scores in self.naming.items():
            found |= {
                f"{name}/names": len(scores.per_class),
                f"{name}/images": scores.queries,
                **{f"{name}/top{k}": v for k, v in scores.recall.items()},
                **{f"{name}/chance_top{k}": v for k, v in scores.chance_recall.items()},
                **{f"{name}/matching_{k}": v for k, v in self.matching[name].items()},
                **{f"{name}/nearest_pixel_{k}": v for k, v in self.nearest_pixel[name].items()},
            }
        found |= {f"pairs/{name}": rate for name, rate in self.pairs.items()}
        for name in _DIRECTIONS:
            one = getattr(self.retrieval, name)
            found |= {f"retrieval/{name}_r{k}": one.recall[k] for k in (1, 5, 10)}
            found |= {f"retrieval/{name}_chance_r{k}": one.chance_recall[k] for k in (1, 5, 10)}
        return found


def evaluate(benchmark: Benchmark, embeddings: Embeddings) -> BenchmarkScores:
    """Scores the embeddings of the benchmark's inputs, and its baselines."""
    return BenchmarkScores(
        naming={name: one.scores(embeddings) for name, one in benchmark.naming.items()},
        matching={name: one.numbers(embeddings) for name, one in benchmark.matching.items()},
        nearest_pixel={name: one.by_pixels() for name, one in benchmark.matching.items()},
        retrieval=benchmark.retrieval.scores(embeddings),
        pairs={} if benchmark.pairs is None else benchmark.pairs.numbers(embeddings),
    )


def write(
    path: pathlib.Path,
    *,
    model: nnx.Module,
    benchmark: Benchmark,
    embeddings: Embeddings,
    scores: BenchmarkScores,
    history: sections.History,
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
    _add_metrics(report, scores)
    _add_curves(report, history)
    if "naming" in benchmark.naming:
        _add_named(report, benchmark.naming["naming"], scores.naming["naming"])
        _add_neighbours(report, benchmark.matching["naming"], embeddings)
    _add_captions(report, benchmark.retrieval, embeddings)
    _add_maps(report, model, benchmark)
    train = config["train"]
    rows = [("batch", f"{train['batch_size']} images with a caption each")]
    sections.add_run_settings(report, config, rows=[*rows, *sections.training_rows(train)])
    return report.write(path)


def _add_metrics(report: Report, scores: BenchmarkScores) -> None:
    report.add_section("Results")
    rows = [_naming_row(scores, name, k) for name in scores.naming for k in (1, 5)]
    rows += [_matching_row(scores, name, k) for name in scores.matching for k in (1, 5)]
    for name, title in _DIRECTIONS.items():
        one = getattr(scores.retrieval, name)
        rows.append(
            Metric(
                name=f"{title}: recall@5 of {one.queries}",
                value=one.recall[5],
                interval=one.recall_interval[5],
                baselines={"chance": one.chance_recall[5]},
                meaning="Held-out images, each with its own caption.",
            )
        )
    rows += [
        Metric(
            name=f"Minimal pairs: {pattern}",
            value=rate,
            baselines={"chance": 0.25},
            meaning="Both images of a pair are nearer to their own statement than to the other's.",
        )
        for pattern, rate in scores.pairs.items()
    ]
    report.add_metrics(rows)
    if not scores.naming:
        return
    report.add_text(
        "“Nearest pixels” names a drawing by the most similar picture among all training "
        "artists' drawings of the same names. Matching does the same in the model's embedding "
        "space, so it also applies to names that are not in the training data."
    )
    bars = [
        Bar(_TITLES[name], one.recall[1], _baselines(scores, name, 1), one.recall_interval[1])
        for name, one in scores.naming.items()
    ]
    report.add_chart(bar_chart({"": bars}, "Top-1 against the baselines", percent=True))


def _baselines(scores: BenchmarkScores, name: str, k: int) -> dict[str, float]:
    chance = scores.naming[name].chance_recall[k]
    return {"chance": chance, "nearest pixels": scores.nearest_pixel[name][f"top{k}"]}


def _naming_row(scores: BenchmarkScores, name: str, k: int) -> Metric:
    one = scores.naming[name]
    return Metric(
        name=f"{_TITLES[name]}: top-{k} of {len(one.per_class)}",
        value=one.recall[k],
        interval=one.recall_interval[k],
        baselines=_baselines(scores, name, k),
        meaning=_MEANINGS[name] if k == 1 else "The right name is among the five.",
    )


def _matching_row(scores: BenchmarkScores, name: str, k: int) -> Metric:
    naming, rate = scores.naming[name], scores.matching[name][f"top{k}"]
    return Metric(
        name=f"{_MATCHING_TITLES[name]}: top-{k} of {len(naming.per_class)}",
        value=rate,
        interval=wilson_interval(round(rate * naming.queries), naming.queries),
        baselines=_baselines(scores, name, k),
        meaning=_MATCHING_MEANINGS[name] if k == 1 else "It is among the five closest.",
    )


def _add_curves(report: Report, history: sections.History) -> None:
    loss = sections.curves(history, {"loss": "training loss"})
    top1 = sections.curves(history, _CURVES, least=2)
    title = "Drawings of the test artist during training"
    charts = (
        sections.step_chart(loss, "Contrastive loss in training", "nats"),
        sections.step_chart(top1, title, "top-1", percent=True),
    )
    sections.add_learning_curves(report, charts)


def _add_named(report: Report, naming: Naming, scores: ZeroShotScores) -> None:
    images = naming.images
    rng = np.random.default_rng(0)
    cards = []
    for wanted in (True, False):
        found = rng.permutation(np.flatnonzero(scores.correct == wanted))[: EXAMPLES // 2]
        for index in found:
            name = images.names[images.labels[index]]
            predicted = images.names[scores.predictions[index]]
            text = name if wanted else f"{predicted} (right: {name})"
            cards.append((_enlarged(images.pixels[index]), text, "ok" if wanted else "wrong"))
    intro = "Drawings of the test artist with the name that the model predicts."
    sections.add_examples(report, "Right and wrong names", intro, [cards], width=110)


def _add_neighbours(report: Report, matching: Matching, embeddings: Embeddings) -> None:
    report.add_section(
        "Nearest neighbours",
        "A drawing of the test artist, and the nearest drawings of the training artists.",
    )
    queries, gallery = matching.images, matching.gallery
    chosen = np.random.default_rng(1).permutation(len(queries.labels))[:QUERIES]
    found = nearest(take(embeddings, queries)[chosen], take(embeddings, gallery), NEIGHBOURS)
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


def _add_captions(report: Report, retrieval: Retrieval, embeddings: Embeddings) -> None:
    report.add_section("Captions", "Images with the nearest caption.")
    images = retrieval.images
    found, texts = (take(embeddings, one) for one in retrieval.inputs)
    chosen = np.random.default_rng(2).permutation(len(images.captions))[: EXAMPLES // 2]
    best = nearest(found[chosen], texts, 1).indices[:, 0]
    cards = []
    for index, text in zip(chosen, best, strict=True):
        predicted, own = images.texts[text], images.captions[index]
        right = predicted == own
        caption = own if right else f"{predicted} (own: {own})"
        cards.append((_enlarged(images.pixels[index]), caption, "ok" if right else "wrong"))
    report.add_images(cards, width=170)


def _add_maps(report: Report, model: nnx.Module, benchmark: Benchmark) -> None:
    report.add_section(
        "Attention and relevance maps",
        "Attention of the class token in the last layer, and the relevance of each patch for a "
        "text (gradient × attention).",
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
    """Two texts for the maps: names of two objects if the image has them, else its captions."""
    names = list(dict.fromkeys(item.name for item in record.objects))
    if len(names) >= 2:
        return tuple(TEMPLATES[0].format(name) for name in names[:2])
    return (record.captions[0], record.captions[-1])


def _enlarged(image: np.ndarray) -> np.ndarray:
    return image.repeat(ENLARGE, axis=0).repeat(ENLARGE, axis=1)
