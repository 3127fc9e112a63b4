"""The report in a real browser: nothing loaded from outside, no console error, fits a phone.

Drives headless Chromium over its DevTools pipe, which needs no package. `--report=PATH` (or the
variable PERCEPTION_REPORT) checks a report that exists; without it a report with every kind of part
is made. Skipped where no Chromium is installed.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from perception_jax import viz

pytestmark = pytest.mark.browser

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
# Chromium reads commands from descriptor 3 and writes replies to 4; this moves ours there.
_LAUNCHER = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)

# Overlapping or clipped chart texts, as strings; half a pixel is tolerated for rounding.
_BAD_TEXTS = """
(() => {
  const bad = [];
  for (const svg of document.querySelectorAll('svg[role=img]')) {
    const frame = svg.getBoundingClientRect();
    if (!frame.width) continue;
    const texts = [...svg.querySelectorAll('text')].map(
      t => [t.textContent, t.getBoundingClientRect()]);
    texts.forEach(([name, a], i) => {
      if (a.left < frame.left - .5 || a.right > frame.right + .5 ||
          a.top < frame.top - .5 || a.bottom > frame.bottom + .5) bad.push('clipped: ' + name);
      for (const [other, b] of texts.slice(i + 1)) {
        if (a.left < b.right - .5 && b.left < a.right - .5 &&
            a.top + 2 < b.bottom - 2 && b.top + 2 < a.bottom - 2) bad.push(name + ' / ' + other);
      }
    });
  }
  return bad;
})()
"""


class Chromium:
    """One headless browser and one page in it, spoken to in DevTools commands."""

    def __init__(self, binary: str, profile: pathlib.Path):
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        # High numbers, so that moving one descriptor to 3 or 4 cannot overwrite the other.
        passed = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (theirs_in, theirs_out)]
        self._process = subprocess.Popen(
            [
                sys.executable,
                *("-I", "-S", "-c", _LAUNCHER, str(passed[0]), str(passed[1])),
                *(binary, *_FLAGS, f"--user-data-dir={profile}", "about:blank"),
            ],
            pass_fds=passed,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (theirs_in, theirs_out, *passed):
            os.close(fd)
        self._in, self._out, self._buffer, self._count = ours_in, ours_out, b"", 0
        self.events: list[dict] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.page(f"{domain}.enable")

    def close(self) -> None:
        with contextlib.suppress(OSError, RuntimeError, TimeoutError):
            self.send("Browser.close")
        os.close(self._in)
        os.close(self._out)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def send(self, method: str, session: str | None = None, **params) -> dict:
        """The result of a command; events that arrive meanwhile are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive(60)
            if reply.get("id") == self._count:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']}")
                return reply["result"]
            self.events.append(reply)

    def page(self, method: str, **params) -> dict:
        """A command to the page."""
        return self.send(method, self._session, **params)

    def _receive(self, timeout: float) -> dict:
        deadline = time.monotonic() + timeout
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("no reply from Chromium")
            data = os.read(self._in, 1 << 16)
            if not data:
                raise RuntimeError("Chromium ended")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def evaluate(self, expression: str):
        """The JSON value of a JavaScript expression, promises awaited."""
        result = self.page(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, path: pathlib.Path, width: int, *, dark: bool = False) -> list[dict]:
        """Loads a file at a viewport width; returns the events until its images are decoded."""
        self.page(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = "dark" if dark else "light"
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.page("Emulation.setEmulatedMedia", features=features)
        self.events.clear()
        self.page("Page.navigate", url=path.resolve().as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._receive(60))
        # Lazy images load only in view: ask for all, as a reader who scrolls would.
        self.evaluate(
            "Promise.all([...document.images].map(i => (i.loading = 'eager', i.decode())))"
        )
        return list(self.events)

    def screenshot(self, path: pathlib.Path) -> None:
        """The whole page as PNG."""
        shot = self.page("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("headless Chromium is not installed (Debian: apt-get install chromium)")
    chromium = Chromium(binary, tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    given = request.config.getoption("--report", default=None)
    given = given or os.environ.get("PERCEPTION_REPORT")
    if given:
        path = pathlib.Path(given)
        assert path.is_file(), f"--report names no file: {path}"
        return path
    return demo_report(tmp_path_factory.mktemp("report") / "report.html")


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
    report.add_image_rows(
        [
            [
                (big, "input"),
                (viz.heatmap(big, blob), "attention of CLS"),
                (viz.patch_pca(tokens, (14, 14)), "patch features"),
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


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_report_opens_alone_and_fits(browser, report, tmp_path, width, dark):
    events = browser.open(report, width, dark=dark)
    by_method = lambda name: [e["params"] for e in events if e.get("method") == name]  # noqa: E731
    requested = [e["request"]["url"] for e in by_method("Network.requestWillBeSent")]
    assert requested[0] == report.resolve().as_uri()
    outside = [u[:120] for u in requested[1:] if not u.startswith(("data:", "about:"))]
    assert outside == []
    logged = [e["entry"]["text"] for e in by_method("Log.entryAdded")]
    logged += [e["args"] for e in by_method("Runtime.consoleAPICalled")]
    logged += [e["exceptionDetails"] for e in by_method("Runtime.exceptionThrown")]
    assert logged == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
    assert browser.evaluate(_BAD_TEXTS) == []


def test_the_check_sees_what_it_forbids(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<body style='width:900px'><script>console.error('x')</script>"
        "<img src='http://127.0.0.1:9/a.png' hidden>"
        "<svg role=img width=99 height=20><text y=15>one</text><text y=15>two</text></svg>"
    )
    browser.events.clear()
    with pytest.raises(AssertionError):
        browser.open(page, 400)  # the image cannot be decoded
    methods = [e.get("method") for e in browser.events]
    assert "Runtime.consoleAPICalled" in methods
    urls = [e["params"]["request"]["url"] for e in browser.events if "requestWillBe" in str(e)]
    assert "http://127.0.0.1:9/a.png" in urls
    assert browser.evaluate("document.documentElement.scrollWidth") > 400
    assert browser.evaluate(_BAD_TEXTS) == ["one / two"]


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


@pytest.mark.parametrize("width", [320, 700, 1280])
def test_awkward_content_neither_bursts_nor_overlaps(browser, tmp_path, width):
    browser.open(awkward_report(tmp_path / "awkward.html"), width)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(_BAD_TEXTS) == []
