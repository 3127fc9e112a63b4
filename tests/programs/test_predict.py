"""`launch.predict encoder` and what is behind it: scores, maps, pictures, and its clear errors."""

from __future__ import annotations

import json

import jax
import numpy as np
import PIL.Image
import pytest
from flax import nnx

import perception_jax
from launch import common, predict
from perception_jax.api import Loaded, Processor
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.scenes.source import portrait
from perception_jax.data.tokenization import ClipTokenizer
from perception_jax.data.views import View
from perception_jax.errors import ConfigError
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.dinov2.modeling import Dinov2
from perception_jax.models.siglip.config import SiglipConfig, SiglipVisionConfig
from perception_jax.models.siglip.modeling import Siglip
from perception_jax.nn import maps
from perception_jax.nn.text_tower import TextConfig
from perception_jax.systems.encoder.picture import draw
from perception_jax.systems.encoder.predict import EncoderPrediction, Explainer, TextScore
from perception_jax.viz.sheet import PANEL
from tests.arrays import drawn

TEXTS = ("a drawing of a dog", "a drawing of a bus", "a banana")
SIZES = {"patch_size": 8, "width": 32, "depth": 2, "heads": 4, "mlp_dim": 64}


def run(*words):
    return common.main(predict.PROGRAM, predict.run, ["encoder", *map(str, words)])


def dinov2():
    config = Dinov2Config(image_size=32, registers=2, **SIZES)
    processor = Processor(image=ImageProcessor(size=32), tokenizer=None)
    return Loaded(
        model=drawn(lambda: Dinov2(config, rngs=nnx.Rngs(params=0))),
        config=config,
        processor=processor,
    )


def siglip(tokenizer):
    sizes = {"width": 32, "depth": 1, "heads": 4, "mlp_dim": 64, "act": "gelu", "eps": 1e-6}
    text = TextConfig(vocab_size=600, context=8, pool="last", projection_bias=True, **sizes)
    config = SiglipConfig(vision=SiglipVisionConfig(image_size=32, **SIZES), text=text)
    # 20 pixels hold two patches of 8; the rest is dropped.
    processor = Processor(image=ImageProcessor(size=20, mode="squash"), tokenizer=tokenizer)
    return Loaded(
        model=drawn(lambda: Siglip(config, rngs=nnx.Rngs(params=0))),
        config=config,
        processor=processor,
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two pictures that share a name, one in a corner of a wide canvas, one broken, a note."""
    folder = tmp_path_factory.mktemp("photos")
    dog, bus = (portrait(name, "twemoji", canvas=64, seed=0) for name in ("dog", "bus"))
    PIL.Image.fromarray(dog).save(folder / "one.png")
    PIL.Image.fromarray(np.pad(bus, ((0, 0), (0, 30), (0, 0)))).save(folder / "one.jpg")
    (folder / "torn.png").write_bytes((folder / "one.png").read_bytes()[:200])
    (folder / "note.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def results(photos, tmp_path_factory):
    """Of a run over the folder with several texts: its files and what it said."""
    out = tmp_path_factory.mktemp("runs") / "maps"
    words = [f"--text={text}" for text in TEXTS]
    assert run("--model=scenes-clip", f"--image={photos}", *words, f"--out={out}") == 0
    return out


def test_every_image_has_a_picture_and_json_of_the_models_own_numbers(results, photos):
    made = sorted(file.name for file in results.iterdir())
    assert made == ["one.jpg.json", "one.jpg.png", "one.png.json", "one.png.png"]
    clip = perception_jax.load("scenes-clip")
    side, patch, depth = (
        getattr(clip.config.vision, name) for name in ("image_size", "patch_size", "depth")
    )
    ids = clip.processor.texts(TEXTS)

    @jax.jit
    def look(model, pixels):
        last, tower = model.text(ids[2:]).embedding, model.vision
        return (
            model(pixels, ids),
            maps.class_attention(tower, pixels)[0],
            maps.text_relevance(tower, pixels, last)[0],
            maps.pixel_gradient(tower, pixels, last)[0],
        )

    for name, size in (("one.png", [64, 64]), ("one.jpg", [94, 64])):
        found = json.loads((results / f"{name}.json").read_text())
        pixels = clip.processor.images([photos / name])
        out, attention, relevance, gradient = look(clip.model, pixels)
        assert found["model"] == "scenes-clip"
        assert found["image"] == str(photos / name)
        assert (found["image_size"], found["input_size"]) == (size, [side, side])
        assert found["attention_of"] == f"class token, layer {depth} of {depth}"
        assert [score["text"] for score in found["texts"]] == list(TEXTS)
        cosines = out.image_embeds[0] @ out.text_embeds.T
        chances = jax.nn.softmax(out.logits_per_image[0])
        for key, wanted in (("cosine", cosines), ("probability", chances)):
            np.testing.assert_allclose([s[key] for s in found["texts"]], wanted, atol=1e-5)
        np.testing.assert_allclose(found["attention"], attention, atol=1e-5)
        np.testing.assert_allclose(found["texts"][2]["relevance"], relevance, atol=1e-5)
        second_last = float(gradient[patch : 2 * patch, -patch:].mean())  # row, column
        assert found["texts"][2]["input_gradient"][1][-1] == pytest.approx(second_last, rel=1e-3)
        with PIL.Image.open(results / f"{name}.png") as picture:
            assert picture.width == 3 * PANEL + 4 * 14


def test_bad_images_of_a_folder_are_named_and_counted(photos, tmp_path, capsys):
    assert run("--model=scenes-clip", f"--image={photos}", f"--out={tmp_path}") == 0
    said = capsys.readouterr().out
    assert f"skipped {photos / 'torn.png'}" in said
    assert "of 2 images, 1 skipped" in said
    assert "note" not in said


def test_an_explainer_compiles_once_for_images_of_all_sizes(photos):
    loaded = perception_jax.load("scenes-clip")
    side, patch = loaded.config.vision.image_size, loaded.config.vision.patch_size
    explain = Explainer(loaded, TEXTS[:1], scale=4 * patch / side)
    seen = [explain(photos / name) for name in ("one.png", "one.jpg")]
    assert explain._run._cache_size() == 1
    assert [one.input_size for one in seen] == [(4 * patch, 4 * patch)] * 2
    assert seen[0].attention.shape == (4, 4)
    assert seen[0].region == (0, 0, 64, 64)
    np.testing.assert_allclose(seen[1].region, (15, 0, 79, 64), atol=2)  # the centre
    assert seen[0].scores[0].probability is None  # of one text alone there is none


def test_a_text_is_found_where_it_is_drawn():
    dog, bus = (portrait(name, "twemoji", canvas=48, seed=0) for name in ("dog", "bus"))
    beside = np.concatenate([dog, bus], axis=1)
    square = np.pad(beside, ((24, 24), (0, 0), (0, 0)), mode="edge")
    seen = Explainer(perception_jax.load("scenes-clip"), TEXTS[:2])(square)
    left = seen.relevance[..., : seen.relevance.shape[2] // 2].sum((1, 2))
    for_dog, for_bus = left / seen.relevance.sum((1, 2))
    assert for_dog > for_bus + 0.2  # 0.91 and 0.44 with the weights that ship


def test_siglip_shows_its_pooling_head_and_scores_each_text_by_itself(photos):
    loaded = siglip(ClipTokenizer.shipped(600, 8))
    seen = Explainer(loaded, TEXTS)(photos / "one.png")
    assert seen.attention_of == "pooling head"
    assert seen.attention.shape == (2, 2)
    assert seen.region == pytest.approx((0, 0, 51.2, 51.2))
    assert seen.gradient.shape == (3, 16, 16)
    pixels, ids = loaded.processor.images([photos / "one.png"]), loaded.processor.texts(TEXTS)
    logits = jax.jit(lambda m, p, i: m(p, i))(loaded.model, pixels, ids).logits_per_image[0]
    chances = [score.probability for score in seen.scores]
    np.testing.assert_allclose(chances, jax.nn.sigmoid(logits), rtol=1e-4)
    with pytest.raises(ConfigError, match="layer 0: this tower has no class token"):
        Explainer(loaded, layer=0)(photos / "one.png")


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("dinov2", ["--text=dog"], "ConfigError: texts were given, but this model (Dinov2)"),
        ("siglip", ["--text=dog"], "CheckpointError: "),
        ("dinov2", ["--layer=2"], "ConfigError: tap on layer 2, but the stack has 2"),
        ("dinov2", ["--scale=0"], "ConfigError: scale: expected a number above 0"),
    ],
)
def test_what_a_model_cannot_do_is_one_clear_error(photos, tmp_path, capsys, kind, words, said):
    perception_jax.export(siglip(None) if kind == "siglip" else dinov2(), tmp_path / "model")
    flags = [f"--model={tmp_path / 'model'}", f"--image={photos / 'one.png'}"]
    assert run(*flags, *words, f"--out={tmp_path / 'out'}") == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_without_texts_needs_none(photos, tmp_path):
    perception_jax.export(dinov2(), tmp_path / "model")
    flags = [f"--model={tmp_path / 'model'}", f"--image={photos / 'one.png'}", "--layer=0"]
    assert run(*flags, f"--out={tmp_path}") == 0
    found = json.loads((tmp_path / "one.json").read_text())
    assert (found["grid"], found["texts"]) == ([4, 4], [])
    assert found["attention_of"] == "class token, layer 1 of 2"


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("photos/torn.png", "ImageError: "),
        ("photos/nothing.png", "nothing there"),
        ("empty", "DataError: "),
        ("photos", "holds the images themselves"),
    ],
)
def test_images_that_cannot_be_used_are_one_clear_error(photos, tmp_path, capsys, image, said):
    (tmp_path / "empty").mkdir()
    path = tmp_path / image if image == "empty" else photos.parent / photos.name / image[7:]
    out = photos if image == "photos" else tmp_path / "out"
    assert run("--model=scenes-clip", f"--image={path}", f"--out={out}") == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_bad_images_alone_fails(photos, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "torn.png").write_bytes((photos / "torn.png").read_bytes())
    assert run("--model=scenes-clip", f"--image={tmp_path / 'bad'}", f"--out={tmp_path}") == 1
    assert "of 0 images, 1 skipped" in capsys.readouterr().out


def prediction(count):
    hot = np.zeros((4, 4), np.float32)
    hot[0, 3] = 1
    return EncoderPrediction(
        view=View(
            pixels=np.zeros((32, 32, 3), np.uint8),
            picture=np.full((PANEL, PANEL, 3), 128, np.uint8),
            region=(0.0, 0.0, 40.0, 40.0),
            original_size=(40, 40),
        ),
        attention_of="class token, layer 1 of 1",
        scores=tuple(TextScore(text=str(k), cosine=0.1, probability=None) for k in range(count)),
        attention=hot,
        relevance=np.repeat(hot[None], count, axis=0),
        gradient=np.repeat(hot.repeat(8, 0).repeat(8, 1)[None], count, axis=0),
        components=np.full((4, 4, 3), 0.5, np.float32),
    )


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_the_picture_shows_each_map_at_its_place(count):
    sheet = draw(prediction(count), "name.png").astype(int)
    assert sheet.shape[1] == max(3, min(count, 4)) * (PANEL + 14) + 14
    warm = (sheet[..., 0] - sheet[..., 2] > 60) & (sheet.min(axis=-1) > 60)
    spots = [
        (y, x)
        for y in range(0, sheet.shape[0] - PANEL // 4, PANEL // 8)
        for x in range(0, sheet.shape[1] - PANEL // 4, PANEL // 8)
        if warm[y : y + PANEL // 4, x : x + PANEL // 4].mean() > 0.3
    ]
    # The hot patch is the last of the first row: right above the middle of its panel.
    assert spots
    for _, x in spots:
        assert (x + PANEL // 8 - 14) % (PANEL + 14) > PANEL / 2
    panels = warm[14 : 14 + PANEL, 14 + PANEL + 14 :][:, :PANEL]
    rows, columns = np.nonzero(panels)
    assert rows.max() < PANEL / 2 < columns.min()
