"""From the published files to a page that shows what GiVE will train on."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import PIL.Image

from launch import check_data, common, import_moinst

NAMES = ("dog", "cat", "car", "cup", "kite_(toy)")


def test_import_and_look(tmp_path, capsys):
    """Objects without boxes, several captions, one's own instruction, a missing picture."""
    rng = np.random.default_rng(0)
    rows = []
    for k in range(12):
        path = tmp_path / "coco/train2017" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(path)
        for c in (k % 5, (k + 1 + k // 5) % 5):
            name = NAMES[c].partition("_")[0]
            rows.append(
                {
                    "image_id": k,
                    "file_name": path.name,
                    "image_path": f"/data/train2017/{path.name}",
                    "category_id": c,
                    "object_id": 10 * k + c,
                    "captions": [f"the {name} of {k}", f"some {name}, again {k}"],
                }
            )
    rows[0]["instruction"] = "Where is my dog?"
    categories = [{"id": k, "name": name} for k, name in enumerate(NAMES)]
    train = tmp_path / "train.json"
    train.write_text(json.dumps({"annotations": rows, "categories": categories}))
    words = ["published", f"--train={train}", f"--images={tmp_path / 'coco'}"]
    out = tmp_path / "out"
    assert common.main(import_moinst.PROGRAM, import_moinst.run, [*words, f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "keys of the rows: image_id 24" in printed
    assert "warning: 12 images, expected about 80,000" in printed
    assert json.loads((out / "report.json").read_text())["total"] == {
        "rows": 24,
        "images": 12,
        "annotations": 24,
        "classes": 5,
    }

    page = tmp_path / "page.html"
    flags = [
        "--config=configs/give/clip_b16.py",
        "--config.backbone=scenes-clip",
        f"--config.data.source={out}",
        f"--config.data.images={tmp_path / 'coco'}",
        "--config.sampler.groups=5",
        "--config.sampler.images=2",
        "--config.data.size=32",
        f"--out={page}",
        "--count=40",
    ]
    assert common.main(check_data.PROGRAM, check_data.run, flags) == 0
    assert "40 of 40 records usable" in capsys.readouterr().out
    text = html.unescape(page.read_text())
    assert "0: dog; the dog of 0" in text
    assert "0: dog; the dog of 0; some dog, again 0" in text
    assert "Where is my dog? → 0 (dog)" in text
    assert re.search(r"(the|photo of the|focus on the) kite → \d \(kite \(toy\)\)", text)
    assert re.search(r"the (dog|cat|car|cup|kite) → absent", text)
    assert "image, 32×32" in text
    assert len(re.findall(r"<img ", text)) == 80

    (tmp_path / "coco/train2017/0.png").unlink()
    assert common.main(import_moinst.PROGRAM, import_moinst.run, [*words, f"--out={out}"]) == 1
    assert "2 of 24 rows lack image" in capsys.readouterr().err
