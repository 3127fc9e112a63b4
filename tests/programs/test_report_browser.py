"""The report in a real browser: nothing loaded from outside, no console error, fits a phone.

Drives headless Chromium over its DevTools pipe, which needs no package. `--report=PATH` checks a
report that exists; without it a report with every kind of part is made. Skipped where no Chromium
is installed.
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

import pytest

from tests.demo_report import awkward_report, demo_report

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


# Rows of images that wrap, or whose first image leaves the view when the row is scrolled.
_BAD_ROWS = """
(() => {
  const bad = [];
  for (const row of document.querySelectorAll('.row')) {
    const cards = [...row.querySelectorAll('.card')];
    if (new Set(cards.map(c => c.getBoundingClientRect().top)).size > 1) bad.push('wraps');
    row.scrollLeft = 1e6;
    const frame = row.getBoundingClientRect(), lead = cards[0].getBoundingClientRect();
    const last = cards.at(-1).getBoundingClientRect();
    if (lead.left < frame.left - 1 || last.right > frame.right + 1) bad.push('out of view');
    row.scrollLeft = 0;
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
    if given:
        path = pathlib.Path(given)
        assert path.is_file(), f"--report names no file: {path}"
        return path
    return demo_report(tmp_path_factory.mktemp("report") / "report.html")


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
    assert browser.evaluate(_BAD_ROWS) == []


def test_the_check_sees_what_it_forbids(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<body style='width:900px'><script>console.error('x')</script>"
        "<img src='http://127.0.0.1:9/a.png' hidden>"
        "<svg role=img width=99 height=20><text y=15>one</text><text y=15>two</text></svg>"
        "<ul class=row><li class=card>one<li class=card>two</ul>"
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
    assert browser.evaluate(_BAD_ROWS) == ["wraps"]


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return awkward_report(tmp_path_factory.mktemp("awkward") / "report.html")


@pytest.mark.parametrize("width", [320, 700, 1280])
def test_awkward_content_neither_bursts_nor_overlaps(browser, awkward, width):
    browser.open(awkward, width)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(_BAD_TEXTS) == []
    assert browser.evaluate(_BAD_ROWS) == []
