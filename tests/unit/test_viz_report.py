"""The report's page: self-contained, escaped, small, written as a whole."""

from __future__ import annotations

import base64
import errno
import html.parser
import io
import os
import re

import numpy as np
import pytest
from PIL import Image

from perception_jax.errors import DataError, PerceptionError
from perception_jax.viz import ImageCard, Metric, Report, blocks

NASTY = "<script>alert('x')</script> & \" onerror=\"alert(1)"


class Tags(html.parser.HTMLParser):
    """Collects tags and fails on a tag that is closed out of order."""

    EMPTY = frozenset({"meta", "link", "img"})

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    return tags


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def full_report() -> Report:
    report = Report(NASTY, NASTY)
    report.add_text(f"before any section\n\nsecond {NASTY}")
    report.add_section(NASTY, NASTY)
    report.add_section(NASTY)
    report.add_metrics([Metric(name=NASTY, value=0.5, baselines={NASTY: 0.1}, meaning=NASTY)])
    report.add_images([(noise(8, 8), NASTY, "ok"), (noise(8, 8),)], caption=NASTY)
    report.add_image_rows([[ImageCard(noise(8, 8), NASTY, "wrong")]], caption=NASTY)
    report.add_table([NASTY], [[NASTY]], caption=NASTY)
    report.add_details({NASTY: NASTY}, summary=NASTY)
    report.add_chart("<svg></svg>", NASTY)
    return report


def test_page_is_well_formed_escaped_and_loads_nothing():
    page = full_report().html()
    tags = parse(page)
    names = {tag for tag, _ in tags.seen}
    assert "script" not in names
    sources = [a["src"] for tag, a in tags.seen if tag == "img"]
    assert len(sources) == 3
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    # Quotes too: a caption cannot leave its attribute.
    assert [a["alt"] for tag, a in tags.seen if tag == "img"] == [NASTY, "image", NASTY]
    assert not [a for _, a in tags.seen if "onerror" in a]
    assert not re.search(r"https?://|url\(|@import", page)
    assert "default-src 'none'" in page


def test_contents_link_to_distinct_sections():
    tags = parse(full_report().html())
    targets = [a["id"] for tag, a in tags.seen if tag == "section" and "id" in a]
    links = [a["href"] for tag, a in tags.seen if tag == "a"]
    assert len(set(targets)) == 2
    assert links == [f"#{target}" for target in targets]


def test_right_and_wrong_differ_in_words_not_only_in_colour():
    report = Report("t")
    report.add_images([(noise(8, 8), "a", "ok"), (noise(8, 8), "b", "wrong"), (noise(8, 8), "c")])
    page = report.html()
    assert re.findall(r"</svg>(right|wrong)</span>(\w)", page) == [("right", "a"), ("wrong", "b")]
    with pytest.raises(DataError, match="found 'good' in image 0 of add_images"):
        report.add_images([(noise(8, 8), "a", "good")])


def decode(uri: str) -> np.ndarray:
    data = base64.b64decode(uri.removeprefix("data:image/webp;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_images_are_exact_when_small_and_scaled_down_when_large():
    small = noise(20, 30)
    uri, width, height = blocks.encode_image(small, 150, "test")
    assert (width, height) == (30, 20)
    assert (decode(uri) == small).all()
    uri, width, height = blocks.encode_image(noise(1000, 2000), 150, "test")
    assert (width, height) == (300, 150)
    assert decode(uri).shape == (150, 300, 3)
    with pytest.raises(DataError, match=r"found float32\[2, 2, 3\] in row 1"):
        blocks.encode_image(np.zeros((2, 2, 3), np.float32), 150, "row 1")


def test_metric_shows_value_interval_and_baselines_on_one_scale():
    page = blocks.metrics(
        [
            Metric(name="top-1", value=0.4, interval=(0.35, 0.45), baselines={"chance": 0.01}),
            Metric(name="rank", value=5, baselines={"chance": 20}, percent=False),
            Metric(name="change", value=-0.5, baselines={"none": 0}, percent=False),
        ]
    )
    assert "40 % <small>35 % – 45 %</small>" in page
    assert re.findall(r"width:([\d.]+)%", page) == ["40.00", "25.00"]
    assert re.findall(r"left:([\d.]+)%", page) == ["1.00", "100.00"]
    assert "<li>chance 20</li>" in page
    assert ">-0.5<" in page


def test_tables_align_numbers_and_refuse_ragged_rows():
    report = Report("t")
    report.add_table(["name", "count", "rate"], [["a", 12_000, 0.51234], ["b", 3, True]])
    page = report.html()
    assert '<td class="number">12,000</td><td>0.5123</td>' in page
    assert "<td>yes</td>" in page
    with pytest.raises(DataError, match=r"expected 2 cells .* found 1 in row 1"):
        report.add_table(["a", "b"], [[1, 2], [3]])


def test_text_is_paragraphs_with_code():
    assert blocks.prose("a `b<c` d\n\n\ne") == "<p>a <code>b&lt;c</code> d</p><p>e</p>"


def test_write_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    assert Report("first").write(path) == path
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PerceptionError, match="No space left on device"):
        Report("second").write(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["report.html"]


def test_the_same_parts_give_the_same_bytes():
    assert full_report().html() == full_report().html()
