"""`launch.predict give` and what is behind it: numbers, maps, pictures, and its clear errors."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from launch import common, predict
from perception_jax.data.images import decode
from perception_jax.data.views import View
from perception_jax.errors import ConfigError
from perception_jax.evals.conditioned.prompts import TEMPLATES
from perception_jax.inference.pixels import blank_image
from perception_jax.nn import maps
from perception_jax.nn.taps import Taps
from perception_jax.systems.give.maps import PRESENT, PresenceTower
from perception_jax.systems.give.model import ConditionedTower
from perception_jax.systems.give.picture import draw
from perception_jax.systems.give.predict import Predictor
from perception_jax.systems.give.prediction import (
    Candidate,
    CaptionScore,
    GivePrediction,
    InstructionPrediction,
)
from perception_jax.systems.give.pretrained import GiveEncoder
from perception_jax.viz.sheet import GAP, PANEL, legend
from tests import tiny_give
from tests.tiny_give import LAYERS

TOLD = ("the kite", "a small red dog")
NAMES = ("dog", "bead_(jewelry)", "kite", "tv set", "sock")
CAPTIONS = ("a red kite", "a dog that sleeps", "nothing at all", "two socks")


def run(*words):
    return common.main(predict.PROGRAM, predict.run, ["give", *map(str, words)])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with adapters, images and lists."""
    root = tmp_path_factory.mktemp("give")
    tiny_give.write(root)
    (root / "photos").mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("one", (20, 30, 3)), ("two", (40, 24, 3))):
        PIL.Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(root / f"photos/{name}.png")
    (root / "names.txt").write_text("\n".join([*NAMES, "", NAMES[0]]))
    (root / "captions.txt").write_text("\n".join(CAPTIONS))
    return root


@pytest.fixture(scope="module")
def encoder(place) -> GiveEncoder:
    return GiveEncoder.from_pretrained(place)


@pytest.fixture(scope="module")
def results(place, tmp_path_factory):
    """Of a run over the folder with everything: what it wrote, by image."""
    out = tmp_path_factory.mktemp("runs") / "told"
    words = [f"--instruction={text}" for text in TOLD]
    lists = [f"--candidates={place / 'names.txt'}", f"--captions={place / 'captions.txt'}"]
    flags = [f"--model={place}", f"--image={place / 'photos'}", f"--out={out}"]
    assert run(*flags, *words, *lists, "--alpha=0.7") == 0
    assert sorted(item.name for item in out.iterdir()) == [
        "one.json", "one.png", "two.json", "two.png"
    ]  # fmt: skip
    return {
        name: (json.loads((out / f"{name}.json").read_text()), decode(out / f"{name}.png"))
        for name in ("one", "two")
    }


@pytest.mark.parametrize("name", ["one", "two"])
def test_every_image_has_the_models_own_numbers(place, encoder, results, name):
    found, _ = results[name]
    image, blank = place / f"photos/{name}.png", blank_image(encoder.processor.image)
    texts = list(TOLD)
    steered = encoder.encode([image] * 2, texts, alpha=0.7)
    copied = encoder.encode([blank] * 2, texts, alpha=0.7).embedding
    static = encoder.encode([image]).embedding
    meaning, captions = encoder.texts(texts), encoder.texts(CAPTIONS)
    assert (found["model"], found["backbone"]) == (str(place), str(place / "backbone"))
    assert (found["alpha"], found["grid"], found["input_size"]) == (0.7, [2, 2], [16, 16])
    told = found["instructions"][:2]
    assert [one["instruction"] for one in told] == texts
    expected = {
        "presence_logit": steered.presence_logit,
        "presence": jax.nn.sigmoid(steered.presence_logit),
        "cosine": (meaning * steered.embedding).sum(1),
        "cosine_blank": (meaning * copied).sum(1),
        "cosine_static": (meaning * static).sum(1),
    }
    for key, values in expected.items():
        np.testing.assert_allclose([one[key] for one in told], values, atol=1e-5, err_msg=key)
    fits = np.asarray(steered.embedding @ captions.T)
    for one, row in zip(told, fits, strict=True):
        order = np.argsort(-row)[:3]
        assert [item["caption"] for item in one["captions"]] == [CAPTIONS[k] for k in order]
        np.testing.assert_allclose(
            [item["cosine"] for item in one["captions"]], row[order], atol=1e-5
        )


@pytest.mark.parametrize("name", ["one", "two"])
def test_candidates_are_ranked_by_presence(place, encoder, results, name):
    found, picture = results[name]
    image, blank = place / f"photos/{name}.png", blank_image(encoder.processor.image)
    words = ["dog", "bead", "kite", "tv set", "sock"]
    texts = [f"the {word}" for word in words]
    out = encoder.encode([image] * 5, texts, alpha=0.7)
    copied = encoder.encode([blank] * 5, texts, alpha=0.7).embedding
    prototypes = np.stack(
        [encoder.texts([form.format(word) for form in TEMPLATES]).mean(0) for word in words]
    )
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    gained = ((out.embedding - copied) * prototypes).sum(1)
    order = np.argsort(-np.asarray(out.presence_logit))
    ranked = found["candidates"]
    assert [one["name"] for one in ranked] == [NAMES[k] for k in order]  # the repeated one once
    assert [one["instruction"] for one in ranked] == [texts[k] for k in order]
    for key, values in (("presence_logit", out.presence_logit), ("calibrated_cosine", gained)):
        np.testing.assert_allclose([one[key] for one in ranked], values[order], atol=1e-5)
    shown = dict.fromkeys([*TOLD, *(texts[k] for k in order[:3])])  # "the kite" may be among both
    assert [one["instruction"] for one in found["instructions"]] == list(shown)
    assert picture.shape[1] == (1 + min(len(shown), 4)) * (PANEL + GAP) + GAP


def test_relevance_is_of_the_presence_logit(place, encoder, results):
    """By its definition, from the tower's own taps; the map is known up to a factor."""
    model, pixels = encoder.model, encoder.processor.images([place / "photos/one.png"])
    taps = Taps(attention=(-1,), rows=jnp.array([0]), inserts=LAYERS)

    @jax.jit
    def see(model, told):
        def score(probes):
            out = model(pixels, told, taps=taps.with_probes(probes))
            return out.presence_logit[0], out.tower

        gradient, out = jax.grad(score, has_aux=True)(jnp.zeros((1, 1, 2, 1, 5)))
        relevance = jax.nn.relu(gradient * out.attention)[0, 0, :, 0].mean(0)
        attention = out.attention[0, 0, :, 0].mean(0)
        return relevance[1:].reshape(2, 2), attention[1:].reshape(2, 2), out.inserts

    for text, seen in zip(TOLD, results["one"][0]["instructions"], strict=False):
        told = encoder.tower([text], alpha=0.7).instruction
        relevance, attention, inserts = see(model, told)
        np.testing.assert_allclose(seen["attention"], attention, atol=1e-4)
        found = np.asarray(seen["relevance"])
        np.testing.assert_allclose(found / found.max(), relevance / relevance.max(), rtol=1e-3)
        words = slice(1, int(told.mask[0].sum()) - 1)  # between start and end
        share = inserts[:, 0, :, 1:, words].sum(-1).mean((0, 1))
        np.testing.assert_allclose(seen["words"], share.reshape(2, 2), atol=1e-4)
        assert seen["places"] is None
    static = maps.class_attention(model.backbone.vision, pixels)[0]
    np.testing.assert_allclose(results["one"][0]["attention"], static, atol=1e-4)


def test_a_presence_towers_cosine_rises_with_the_logit_alone(place, encoder):
    pixels = encoder.processor.images([place / "photos/one.png"] * 2)
    steered = encoder.tower(TOLD)
    assert isinstance(PresenceTower(steered), maps.Tower)
    out = jax.jit(lambda model, told: PresenceTower(ConditionedTower(model, told))(pixels))(
        encoder.model, steered.instruction
    )
    logit = encoder.encode([place / "photos/one.png"] * 2, TOLD).presence_logit
    cosine = out.embedding @ jnp.array(PRESENT) / jnp.linalg.norm(out.embedding, axis=1)
    np.testing.assert_allclose(cosine, logit / jnp.sqrt(1 + logit**2), rtol=1e-4)


def test_a_head_for_places_says_where(tmp_path):
    encoder = GiveEncoder.from_pretrained(tiny_give.write(tmp_path, dense=True))
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    seen = Predictor(encoder, TOLD[:1])(image)
    out = jax.jit(lambda model, pixels, told: model(pixels, told).place_logits)(
        encoder.model, encoder.processor.images([image]), encoder.tower(TOLD[:1]).instruction
    )
    np.testing.assert_allclose(
        seen.instructions[0].places.ravel(), jax.nn.softmax(out[0]), atol=1e-5
    )
    assert seen.to_json()["instructions"][0]["places"] is not None


def test_a_predictor_compiles_once_for_images_of_all_sizes(place, encoder):
    see = Predictor(encoder, TOLD[:1], candidates=NAMES[:2], scale=2.0)
    shapes = [see(place / f"photos/{name}.png").attention.shape for name in ("one", "two")]
    assert shapes == [(4, 4)] * 2
    assert see._maps._conditioned._cache_size() == see._maps._static._cache_size() == 1
    assert see._pairs._on(None).jitted._cache_size() == 1


def test_a_backbone_alone_is_seen_without_steering(place, encoder, tmp_path):
    flags = [f"--model={place / 'backbone'}", f"--image={place / 'photos/one.png'}"]
    assert run(*flags, f"--instruction={TOLD[0]}", "--alpha=0", f"--out={tmp_path}") == 0
    (told,) = json.loads((tmp_path / "one.json").read_text())["instructions"]
    assert (told["presence_logit"], told["presence"], told["words"]) == (None, None, None)
    assert told["cosine"] == pytest.approx(told["cosine_static"], abs=1e-6)
    static = encoder.encode([place / "photos/one.png"]).embedding[0]
    assert told["cosine"] == pytest.approx(float(encoder.texts(TOLD[:1])[0] @ static), abs=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--instruction=the kite", "--model=ROOT/backbone"], "ConfigError: this is a backbone"),
        (
            ["--candidates=ROOT/names.txt", "--model=ROOT/backbone", "--alpha=0"],
            "fresh adapters: they change nothing",
        ),
        (["--instruction=the kite", "--model=ROOT/none.safetensors"], "none.safetensors"),
        (["--instruction=the kite", "--backbone=ROOT/none"], "CheckpointError: "),
        ([], "ConfigError: nothing to predict"),
        (["--instruction= "], "ConfigError: expected words in each"),
        (["--instruction=the kite", "--alpha=-1"], "alpha: expected a number from 0 upwards"),
        (["--instruction=the kite", "--scale=0"], "scale: expected a number above 0"),
        (
            ["--candidates=ROOT/none.txt"],
            "ROOT/none.txt: expected a readable file of text",
        ),
        (
            ["--candidates=ROOT/photos/one.png"],
            "one.png:1: expected UTF-8 text, found the byte",
        ),
    ],
)
def test_what_cannot_be_done_is_one_clear_error(place, tmp_path, capsys, words, said):
    words = [word.replace("ROOT", str(place)) for word in words]
    flags = [f"--model={place}", f"--image={place / 'photos/one.png'}", f"--out={tmp_path / 'out'}"]
    assert run(*flags, *words) == 1
    error = capsys.readouterr().err
    assert said.replace("ROOT", str(place)) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_flag_of_another_system_is_refused(place, tmp_path, capsys):
    flags = [f"--model={place}", f"--image={place / 'photos/one.png'}", f"--out={tmp_path / 'out'}"]
    assert run(*flags, "--text=dog") == 2
    assert "--text: there is no such flag" in capsys.readouterr().err


def test_a_strength_must_be_a_number(encoder):
    with pytest.raises(ConfigError, match="alpha"):
        Predictor(encoder, TOLD, alpha=float("nan"))


def prediction(
    count: int, *, candidates: int = 0, alpha: float = 1.0, places: bool = False
) -> GivePrediction:
    hot = np.zeros((4, 4), np.float32)
    hot[0, 3] = 1
    told = [
        InstructionPrediction(
            instruction=f"the thing number {k}",
            presence_logit=None if alpha == 0 else 3.0 - k,
            cosine=0.5,
            cosine_blank=0.2,
            cosine_static=0.1,
            captions=(CaptionScore(caption="a thing that is long to tell", cosine=0.4),),
            attention=hot,
            relevance=hot,
            places=hot if places else None,
            words=None,
        )
        for k in range(count)
    ]
    ranked = [
        Candidate(name=str(k), instruction="", presence_logit=-k, calibrated_cosine=0.1)
        for k in map(float, range(candidates))
    ]
    return GivePrediction(
        view=View(
            pixels=np.zeros((32, 32, 3), np.uint8),
            picture=np.full((PANEL, PANEL, 3), 128, np.uint8),
            region=(0.0, 0.0, 40.0, 40.0),
            original_size=(40, 40),
        ),
        alpha=alpha,
        attention_of="class token, layer 1 of 1",
        attention=hot,
        instructions=tuple(told),
        candidates=tuple(ranked),
    )


@pytest.mark.parametrize(
    ("count", "options"),
    [(1, {}), (3, {"candidates": 12}), (2, {"places": True}), (5, {}), (2, {"alpha": 0.0})],
)
def test_the_picture_shows_each_map_at_its_place(count, options):
    sheet = draw(prediction(count, **options), "name.png").astype(int)
    columns = 1 + min(count, 4)
    assert sheet.shape[1] == columns * (PANEL + GAP) + GAP
    sheet = sheet[: -len(legend(sheet.shape[1]))]
    warm = (sheet[..., 0] - sheet[..., 2] > 60) & (sheet.min(axis=-1) > 60)
    across = warm[:, GAP:].reshape(len(sheet), columns, PANEL + GAP)
    # The hot patch is the last of its row: in the right half of its panel, and of all panels.
    assert across[..., : PANEL // 2].sum() < 0.01 * across.sum()
    seen = across.sum(axis=(0, 2)) / (PANEL / 4) ** 2
    one = seen[0] / -(-count // 4)  # attention without an instruction, once a block of four
    assert one > 0.3
    maps_each = 3 if "places" in options else 2
    shown = [maps_each * len(range(k, count, 4)) for k in range(columns - 1)]
    np.testing.assert_allclose(seen[1:] / one, shown, rtol=0.1)
