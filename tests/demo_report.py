"""Two reports for the browser test: one as the quickstart might write it, one to burst the page."""

from __future__ import annotations

import pathlib

import jax.numpy as jnp
import numpy as np

from perception_jax import viz
from perception_jax.nn import maps


def scene(seed: int, size: int = 64) -> np.ndarray:
    """A disc and a bar on a gradient: something to look at."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    start, end = rng.uniform(90, 250, (2, 3))
    image = start + (end - start) * (0.7 * x + 0.3 * y)[..., None]
    cx, cy, radius = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7), rng.uniform(0.12, 0.3)
    disc = (x - cx) ** 2 + (y - cy) ** 2 < radius**2
    image[disc] = viz.colormap.categorical(seed)
    bar = (abs(x - 1 + cx) < 0.05) & (abs(y - 0.5) < 0.35)
    image[bar] = viz.colormap.categorical(seed + 3)
    return image.astype(np.uint8)


def demo_report(path: pathlib.Path) -> pathlib.Path:
    """A report with every kind of part, as the quickstart's might look."""
    rng = np.random.default_rng(0)
    report = viz.Report(
        "A small CLIP learns to name drawings",
        "4.1 M parameters, 2,000 steps on two cores in 8 min 12 s. Trained on four artists, tested "
        "on a fifth whose drawings it never saw.",
    )
    report.add_section(
        "What it can do", "Each number with what a model that learned nothing would score."
    )
    report.add_metrics(
        [
            viz.Metric(
                name="Names an unseen artist's drawing",
                value=0.412,
                interval=(0.394, 0.431),
                baselines={"chance": 1 / 312, "nearest pixel": 0.087},
                meaning="How often the first of 312 names is right, for one object per picture.",
            ),
            viz.Metric(
                name="Names a held-out concept",
                value=0.114,
                baselines={"chance": 1 / 40, "nearest pixel": 0.061},
                meaning="The same among 40 concepts that never occur in training.",
            ),
            viz.Metric(
                name="Median rank of the right caption",
                value=4,
                percent=False,
                baselines={"chance": 500},
                meaning="Among 1,000 captions; 1 is best.",
            ),
            viz.Metric(name="Training loss at the end", value=0.8123, percent=False),
        ]
    )
    add_charts(report, rng)
    add_pictures(report, rng)
    report.add_section("How it was made")
    report.add_text(
        "Run `python -m launch.train --config=configs/quickstart.py` again to make this page; the "
        "same seed gives the same numbers on the same machine.\n\nText is <escaped> & safe."
    )
    report.add_table(
        ["split", "pictures", "artists", "top-1", "seconds"],
        [
            ["train", 32_000, "Noto, Noto v1, Fluent flat, Fluent 3D", 0.873, 402.25],
            ["unseen artist", 1_000, "Twemoji", 0.412, 8.5],
        ],
        caption="What each split holds.",
    )
    report.add_details({"seed": 0, "model": {"width": 192, "layers": 4}, "path": path.parent})
    return report.write(path)


def add_charts(report: viz.Report, rng: np.random.Generator) -> None:
    steps = np.arange(1, 2001)
    loss = 5.5 * np.exp(-steps / 600) + 0.8 + rng.normal(0, 0.08, steps.size)
    checked = steps[99::100]
    report.add_section("Training", "Loss falls, and accuracy on the unseen artist follows.")
    report.add_chart(
        viz.line_chart(
            {
                "train": (steps, loss),
                "validation": (checked, 5.5 * np.exp(-checked / 640) + 1.1),
            },
            "Contrastive loss",
            "step",
            "loss per pair, in nats (logarithmic)",
            log_y=True,
        ),
        "Mean over the batch of both directions.",
    )
    rise = 1 - np.exp(-checked / 700)
    report.add_chart(
        viz.line_chart(
            {"training artists": (checked, 0.9 * rise), "unseen artist": (checked, 0.43 * rise)},
            "Zero-shot naming while training",
            "step",
            "right at the first guess",
            percent=True,
            references={"nearest pixel": 0.087, "chance": 1 / 312},
        )
    )

    def bar(label: str, value: float, chance: float, pixel: float) -> viz.Bar:
        baselines = {"chance": chance, "nearest pixel": pixel}
        return viz.Bar(label, value, baselines, (0.93 * value, 1.07 * value))

    report.add_chart(
        viz.bar_chart(
            {
                "Unseen artist, 312 names": [
                    bar("first guess right", 0.412, 0.003, 0.087),
                    bar("one of five guesses right", 0.683, 0.016, 0.194),
                ],
                "Held-out concepts, 40 names": [
                    bar("first guess right", 0.114, 0.025, 0.061),
                    bar("one of five guesses right", 0.342, 0.125, 0.233),
                ],
            },
            "Naming against the baselines",
            percent=True,
            maximum=1.0,
        )
    )
    names = ["orientation", "presence", "count", "colour", "drawn text"]
    report.add_chart(
        viz.heat_table(
            rng.uniform(0.1, 0.9, (3, 5)),
            ["this model", "no training", "chance"],
            names,
            "Minimal pairs right, by visual pattern",
            percent=True,
        )
    )


def add_pictures(report: viz.Report, rng: np.random.Generator) -> None:
    report.add_section("Right and wrong", "The first eight test pictures, not the best eight.")
    answers = ["red apple", "hot air balloon", "t-rex", "white exclamation mark"]
    report.add_images(
        [
            (
                scene(k),
                f"{answers[k % 4]}" + (f"\nsaid: {answers[(k + 1) % 4]}" if k % 3 else ""),
                "wrong" if k % 3 else "ok",
            )
            for k in range(8)
        ]
    )
    report.add_section("Nearest neighbours", "A test drawing, then the closest training drawings.")
    report.add_image_rows(
        [
            [
                viz.ImageCard(scene(7 * r + k), "query" if k == 0 else f"{0.9 - 0.1 * k:.2f}")
                for k in range(6)
            ]
            for r in range(2)
        ]
    )
    report.add_section("Where it looks")
    big = scene(3, 448)
    y, x = np.mgrid[:14, :14] / 14
    blob = np.exp(-((x - 0.4) ** 2 + (y - 0.6) ** 2) / 0.03)
    tokens = np.stack([x, y, blob, x * y], -1).reshape(196, 4)
    boxes = np.array([[60.0, 80.0, 220.0, 260.0], [180.0, 200.0, 420.0, 430.0]])
    features = np.asarray(maps.patch_pca(jnp.asarray(tokens, jnp.float32)[None], (14, 14))[0])
    report.add_image_rows(
        [
            [
                (big, "input"),
                (viz.heatmap(big, blob), "attention of CLS"),
                (np.round(features * 255).astype(np.uint8), "patch features"),
            ]
        ],
        caption="Attention of the last layer, averaged over heads.",
        width=150,
    )
    report.add_images(
        [
            (viz.draw_boxes(big, boxes, ["apple 0.91", "balloon 0.66"]), "Boxes and scores"),
            (viz.draw_masks(big, blob.repeat(32, 0).repeat(32, 1)[None] > 0.4), "A mask"),
        ],
        width=300,
    )


def awkward_report(path: pathlib.Path) -> pathlib.Path:
    """Long names, large and tiny numbers, many parts: whatever might burst the layout."""
    word = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerk" * 2
    long = "a rather long name of something that goes on for quite a while, WITH CAPITALS"
    report = viz.Report(word, long * 3)
    report.add_section(word, word)
    report.add_metrics(
        [
            viz.Metric(
                name=word,
                value=1.5e-7,
                interval=(1e-9, 1.25e12),
                baselines={word: 2.5e11, long: 1e-12},
                meaning=word,
                percent=False,
            )
        ]
    )
    for low, high in ((0, 1), (-1e-7, 3e-7), (1e6, 1e9), (99_999.5, 100_000.5), (1e-6, 1e6)):
        x = np.linspace(low, high, 50)
        lines = {f"{long} {k}": (x, x * (k + 1)) for k in range(9)}
        chart = viz.line_chart(lines, long, word, long, references={word: high, long: low})
        report.add_chart(chart, word)
        if low > 0:
            report.add_chart(viz.line_chart(lines, long, log_y=True))
    bars = [
        viz.Bar(long, 1.0, {long: 0.5, word: 1.0}),
        viz.Bar(word, 123_456_789.0),
        viz.Bar("", 0),
    ]
    report.add_chart(viz.bar_chart({word: bars, long: bars, "": bars}, word))
    report.add_chart(viz.heat_table(np.eye(12), [long] * 12, [word] * 12, word))
    report.add_table([word, long], [[word, 1e-9], [long * 4, 123_456_789]], caption=word)
    cards = [(scene(0, 16), word, "wrong"), (scene(1, 900), long, "ok"), (scene(2)[:1], "")]
    report.add_images(cards, caption=word)
    report.add_images(cards, width=500)
    report.add_image_rows([cards * 4, cards[:1]], caption=word)
    report.add_details({word: [word] * 2})
    return report.write(path)
