"""The contrastive task: what counts as a negative, evaluators, the model for the sigmoid loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perception_jax.api import Loaded
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.scenes.pairs import PairSource
from perception_jax.data.scenes.sample import SceneConfig
from perception_jax.errors import ConfigError
from perception_jax.evals.predictions import PredictionWriter, read_predictions
from perception_jax.models.clip.modeling import Clip
from perception_jax.models.params import flatten
from perception_jax.models.resized import resized_kernel
from perception_jax.nn import maps
from perception_jax.nn.taps import Taps
from perception_jax.ops.losses import unit
from perception_jax.ops.resize import bicubic
from perception_jax.systems.contrastive.benchmark import training_source
from perception_jax.systems.contrastive.data import ContrastiveData
from perception_jax.systems.contrastive.encode import Encoder, Texts
from perception_jax.systems.contrastive.evaluate import (
    CaptionedImages,
    MinimalPairs,
    Retrieval,
    embeddings_on_disk,
)
from perception_jax.systems.contrastive.task import (
    ContrastiveConfig,
    ContrastiveTask,
    SigmoidClip,
    batch_accuracy,
    equal_rows,
)
from perception_jax.testing import tiny_clip
from tests.arrays import drawn, normal

PROCESSOR = ImageProcessor(size=tiny_clip.SIZE)


def random_clip(seed=0):
    return drawn(lambda: Clip(tiny_clip.CONFIG, rngs=nnx.Rngs(params=0)), seed)


def started(clip, config, **settings):
    """A task that starts from a CLIP."""
    loaded = Loaded(model=clip, config=tiny_clip.CONFIG, processor=tiny_clip.PROCESSOR, name="tiny")
    data = ContrastiveData([], loaded.processor, batch_size=2, seed=0)
    return ContrastiveTask(ContrastiveConfig(**settings), config, data=data, start=loaded)


def test_a_start_gives_every_leaf_and_resizes_positions_and_patches():
    clip = random_clip()
    stored = flatten(clip)
    vision = tiny_clip.CONFIG.vision
    for patch, size in ((vision.patch_size, vision.image_size), (vision.patch_size // 2, 24)):
        config = dataclasses.replace(
            tiny_clip.CONFIG,
            vision=dataclasses.replace(vision, patch_size=patch, image_size=size),
        )
        task = started(clip, config)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[1])
        model = nnx.eval_shape(lambda task=task: task.init(jax.random.key(0)))
        targets = {
            path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=device)
            for path, leaf in flatten(model).items()
        }
        found = task.pretrained(targets)
        assert found.keys() == stored.keys() == targets.keys()
        for path, leaf in found.items():
            assert (leaf.shape, leaf.dtype) == (targets[path].shape, jnp.bfloat16), path
            assert leaf.sharding == device
            if leaf.shape == stored[path].shape:
                np.testing.assert_array_equal(leaf, stored[path].astype(jnp.bfloat16))
    different = {path for path, leaf in found.items() if leaf.shape != stored[path].shape}
    assert different == {"vision/patch_embed/kernel", "vision/position_embedding"}
    np.testing.assert_array_equal(
        found["vision/position_embedding"][0],
        stored["vision/position_embedding"][0].astype(jnp.bfloat16),
    )


def test_a_start_that_is_another_model_is_refused():
    clip, config = random_clip(), tiny_clip.CONFIG
    wider = dataclasses.replace(config, text=dataclasses.replace(config.text, depth=7))
    with pytest.raises(ConfigError, match=r"start: tiny is ClipConfig\(.*depth=1.*depth=7"):
        started(clip, wider)
    with pytest.raises(ConfigError, match="tiny is a CLIP, which has no logit bias"):
        started(clip, config, loss="sigmoid")


def test_a_kernel_for_other_patches_gives_the_same_of_resized_patches():
    kernel, patches = normal(0, 3, 3, 3, 5), normal(1, 7, 3, 3, 3)
    larger = resized_kernel(kernel, 6)
    assert larger.shape == (6, 6, 3, 5)
    enlarged = jax.vmap(lambda x: bicubic(x, (6, 6), antialias=True))(patches)
    given = jnp.einsum("nhwc,hwcd->nd", patches, kernel)
    np.testing.assert_allclose(
        jnp.einsum("nhwc,hwcd->nd", enlarged, larger), given, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(resized_kernel(larger, 6), larger)


def test_equal_texts_are_no_negatives_of_each_other():
    ids = jnp.asarray(np.array([[1, 2], [3, 4], [1, 2], [1, 2]]))
    expected = np.zeros((4, 4), bool)
    for i, j in ((0, 2), (0, 3), (2, 3)):
        expected[i, j] = expected[j, i] = True
    np.testing.assert_array_equal(equal_rows(ids), expected)


def test_batch_accuracy_counts_equal_texts_as_right():
    eye = np.eye(3, dtype=np.float32)
    image, text = jnp.asarray(eye), jnp.asarray(eye[[2, 1, 0]])  # rows 0 and 2 find each other's
    same, accuracy = np.zeros((3, 3), bool), jax.jit(batch_accuracy)
    assert float(accuracy(image, text, same)) == pytest.approx(1 / 3)
    same[[0, 2], [2, 0]] = True
    assert float(accuracy(image, text, same)) == 1.0


def test_only_the_sigmoid_loss_has_a_logit_bias():
    softmax = nnx.eval_shape(lambda: tiny_clip.task("softmax").init(jax.random.key(0)))
    sigmoid = jax.jit(lambda: tiny_clip.task("sigmoid").init(jax.random.key(0)))()
    assert softmax.logit_bias is None
    assert isinstance(sigmoid, SigmoidClip)
    assert float(sigmoid.logit_bias[...]) == -10.0


def test_towers_compute_in_the_dtype_of_the_parameters(monkeypatch):
    task = tiny_clip.task()
    model = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), random_clip())
    model = jax.tree.map(jnp.asarray, model)
    found = {}
    for name in ("vision", "text"):
        kind = type(getattr(model, name))

        def recorded(self, *args, real=kind.__call__, name=name, **options):
            out = real(self, *args, **options)
            found[name] = out.embedding.dtype
            return out

        monkeypatch.setattr(kind, "__call__", recorded)
    batch = {
        k: jnp.asarray(v) for k, v in next(iter(task.datasets()["train"])).items() if k != "id"
    }
    loss, metrics = jax.eval_shape(task.loss, model, batch, jax.random.key(0))
    assert found == {"vision": jnp.bfloat16, "text": jnp.bfloat16}
    assert loss.dtype == metrics["scale"].dtype == jnp.float32


def test_the_temperature_is_at_most_100():
    task = tiny_clip.task()
    model = random_clip()
    model.logit_scale[...] = jnp.float32(10.0)
    batch = {
        k: jnp.asarray(v) for k, v in next(iter(task.datasets()["train"])).items() if k != "id"
    }
    _, metrics = jax.jit(task.loss)(model, batch, jax.random.key(0))
    assert float(metrics["scale"]) == pytest.approx(100, rel=1e-4)


def test_encoder_pads_the_last_batch_and_compiles_once():
    model = random_clip()
    task = tiny_clip.task()
    encoder = Encoder(task.processor.image, task.processor.tokenizer, batch_size=4)
    pixels = np.stack([task.data.examples(0).source[k].image for k in range(10)])
    together = encoder.images(model, pixels)
    alone = np.concatenate([encoder.images(model, pixels[k : k + 1]) for k in range(10)])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    assert encoder._image._on(None).jitted._cache_size() == 1


def test_retrieval_counts_equal_captions_as_right():
    task = tiny_clip.task()
    images = CaptionedImages.from_source(task.data.examples(0).source, PROCESSOR)
    assert len(images.texts) == 8  # 64 images share eight captions
    assert all(images.texts[text] == images.captions[image] for image, text in images.pairs)
    model = jax.jit(lambda: Clip(tiny_clip.CONFIG, rngs=nnx.Rngs(params=0)))()
    encoder = Encoder(task.processor.image, task.processor.tokenizer)
    numbers = Retrieval(encoder, images)(model)
    cosine = encoder.images(model, images.pixels) @ encoder.texts(model, images.texts).T
    right = np.array([[text == own for text in images.texts] for own in images.captions])
    for direction, scores, wanted in (
        ("image_to_text", cosine, right),
        ("text_to_image", cosine.T, right.T),
    ):
        best = np.where(wanted, scores, -np.inf).max(axis=1, keepdims=True)
        ahead = ((scores >= best - 1e-6) & ~wanted).sum(axis=1)  # ties go against the model
        for k in (1, 5):
            assert numbers[f"{direction}_r{k}"] == pytest.approx((ahead < k).mean()), (direction, k)
    assert 0 < numbers["image_to_text_r1"] < numbers["image_to_text_r5"] < 1


@pytest.fixture
def evaluated():
    """Retrieval among 24 images, and the rows that its encoder runs, by kind of input."""
    source = [tiny_clip.task().data.examples(0).source[k] for k in range(24)]
    images = CaptionedImages.from_source(source, PROCESSOR)
    one = Retrieval(Encoder(PROCESSOR, tiny_clip.PROCESSOR.tokenizer, batch_size=2), images)
    rows = {"_image": [], "_text": []}
    for name, seen in rows.items():
        real = getattr(one.encoder, name)

        def counted(model, part, mesh, real=real, seen=seen):
            seen.append(len(part))
            return real(model, part, mesh)

        setattr(one.encoder, name, counted)
    return one, rows


def test_an_input_that_comes_again_is_embedded_once(evaluated, tmp_path):
    """In one list, as the statements of minimal pairs do, or in another."""
    one, rows = evaluated
    texts, model = one.inputs[1], random_clip()
    inputs = (Texts(texts.texts + texts.texts[:3]), texts)
    assert [name for name, _ in one.encoder.embed(model, inputs)] == list(texts.ids)
    assert sum(rows["_text"]) == len(texts.ids)
    found = embeddings_on_disk(one.encoder, model, inputs, tmp_path, settings="tiny")
    assert tuple(found) == texts.ids


def test_a_stopped_evaluation_goes_on_where_it_stopped(evaluated, tmp_path, monkeypatch):
    one, rows = evaluated
    model, settings = random_clip(), {"settings": "tiny"}
    expected = one(model)
    assert (sum(rows["_image"]), sum(rows["_text"])) == (24, 8)
    added = PredictionWriter.add

    def stopped(self, prediction):
        if prediction.id.startswith("11 "):
            raise KeyboardInterrupt
        added(self, prediction)

    with monkeypatch.context() as patch:
        patch.setattr(PredictionWriter, "add", stopped)
        with pytest.raises(KeyboardInterrupt):
            embeddings_on_disk(one.encoder, model, one.inputs, tmp_path, **settings)
    (folder,) = tmp_path.iterdir()
    shard = folder / "predictions-00000-of-00001.jsonl"
    shard.write_bytes(shard.read_bytes()[:-9])  # what a kill cut off
    for left in ((24 - 10, 8), (0, 0)):
        rows["_image"].clear()
        rows["_text"].clear()
        found = embeddings_on_disk(one.encoder, model, one.inputs, tmp_path, **settings)
        assert (sum(rows["_image"]), sum(rows["_text"])) == left
        assert one.numbers(found) == expected
    texts = [item.prompt for item in read_predictions(folder) if item.prompt]
    assert tuple(texts) == one.images.texts
    np.testing.assert_allclose(
        found[f"text: {texts[0]}"], one.encoder.texts(model, texts)[0], atol=1e-6
    )


@pytest.mark.parametrize("other", ["weights", "settings", "images"])
def test_embeddings_of_something_else_are_not_used(evaluated, tmp_path, other):
    one, rows = evaluated
    first, second = random_clip(), random_clip()
    embeddings_on_disk(one.encoder, first, one.inputs, tmp_path, settings="tiny")
    rows["_image"].clear()
    inputs, settings = one.inputs, "other" if other == "settings" else "tiny"
    if other == "weights":  # a change that bfloat16 rounds off
        second.vision.projection.kernel[...] *= 1 + 1e-6
    if other == "images":
        images = dataclasses.replace(one.images, pixels=one.images.pixels.copy())
        images.pixels[3, 0, 0, 0] ^= 1
        inputs = (images, one.inputs[1])
    embeddings_on_disk(one.encoder, second, inputs, tmp_path, settings=settings)
    assert sum(rows["_image"]) == 24
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture(scope="module")
def scene():
    return random_clip(3).vision, normal(0, 2, 16, 16, 3), normal(1, 2, 16)


def test_class_attention_is_what_the_class_token_leaves_to_patches(scene):
    tower, pixels, _ = scene

    @jax.jit
    def both(tower, pixels):
        whole = tower(pixels, taps=Taps(attention=(-1,))).attention[0].mean(axis=1)
        return maps.class_attention(tower, pixels), whole

    attention, whole = jax.device_get(both(tower, pixels))
    np.testing.assert_allclose(attention.reshape(2, 4), whole[:, 0, 1:], atol=1e-6)
    np.testing.assert_allclose(attention.sum((1, 2)) + whole[:, 0, 0], 1, atol=1e-6)


def cosine(tower, pixels, text):
    return jnp.sum(unit(tower(pixels).embedding) * unit(text))


def test_relevance_is_the_positive_part_of_attention_times_gradient(scene):
    tower, pixels, text = scene
    taps = Taps(attention=(-1,))
    probes = taps.zeros(depth=2, batch=2, heads=2, keys=5)

    @jax.jit
    def both(tower, pixels, text, probes):
        gradient = jax.grad(
            lambda p: cosine(lambda x: tower(x, taps=taps.with_probes(p)), pixels, text)
        )
        products = (gradient(probes) * tower(pixels, taps=taps).attention)[0, :, :, 0, 1:]
        expected = jnp.maximum(products, 0).mean(axis=1).reshape(2, 2, 2)
        return maps.text_relevance(tower, pixels, text), expected

    relevance, expected = jax.device_get(both(tower, pixels, text, probes))
    np.testing.assert_allclose(relevance, expected, atol=1e-6)
    assert float(relevance.max()) > 0


def test_pixel_gradient_by_finite_differences(scene):
    tower, pixels, text = scene
    step = 1e-2
    score = jax.jit(cosine)

    def bumped(channel, by):
        bump = np.array(pixels)
        bump[0, 3, 5, channel] += by
        return float(score(tower, jnp.asarray(bump), text))

    slopes = [(bumped(c, step) - bumped(c, -step)) / (2 * step) for c in range(3)]
    numeric = np.linalg.norm(slopes)
    found = np.asarray(jax.jit(maps.pixel_gradient)(tower, pixels, text))[0, 3, 5]
    assert float(found) == pytest.approx(float(numeric), rel=0.02)


def altered_batch(rows=4):
    data = ContrastiveData(
        tiny_clip.ColourSource(), tiny_clip.PROCESSOR, batch_size=rows, seed=0, altered=True
    )
    task = ContrastiveTask(ContrastiveConfig(), tiny_clip.CONFIG, data=data)
    batch = next(iter(task.datasets()["train"]))
    (shapes,) = task.batch_shapes()
    assert {key: (x.shape, x.dtype) for key, x in batch.items() if key in shapes} == {
        key: (x.shape, x.dtype) for key, x in shapes.items()
    }
    return task, {key: jnp.asarray(x) for key, x in batch.items() if key in shapes}


def test_altered_captions_are_further_negatives():
    task, batch = altered_batch()
    batch["altered"] = jnp.array([True, False, True, False])
    model, loss = random_clip(), jax.jit(task.loss)
    found, _ = loss(model, batch, jax.random.key(0))
    none, _ = loss(model, {**batch, "altered": jnp.zeros(4, bool)}, jax.random.key(0))
    encoder = Encoder(PROCESSOR, tiny_clip.PROCESSOR.tokenizer, batch_size=4)
    image = encoder.images(model, np.asarray(batch["image"]))
    text, other = (encoder._text(model, np.asarray(batch[k])) for k in ("ids", "altered_ids"))
    scale = float(np.exp(model.logit_scale[...]))
    same = np.asarray(equal_rows(batch["ids"]))
    logits = np.where(same, -np.inf, scale * image @ text.T)
    more = np.where(batch["altered"], scale * np.sum(image * other, axis=1), -np.inf)
    before = np.log(np.exp(logits).sum(axis=1))
    after = np.log(np.exp(logits).sum(axis=1) + np.exp(more))
    assert float(found - none) == pytest.approx(0.5 * np.mean(after - before), rel=1e-3)
    assert float(found) > float(none)


def test_altered_captions_need_the_softmax_loss():
    data = ContrastiveData(
        tiny_clip.ColourSource(), tiny_clip.PROCESSOR, batch_size=4, seed=0, altered=True
    )
    with pytest.raises(ConfigError, match=r"data\.altered: the loss 'sigmoid' takes no"):
        ContrastiveTask(ContrastiveConfig(loss="sigmoid"), tiny_clip.CONFIG, data=data)


def test_minimal_pairs_count_where_both_images_find_their_statement():
    config = SceneConfig(canvas=16, split="test", language="none")
    source = PairSource(config, seed=1, length=4, patterns=("count", "colour"))
    pairs = [source[k] for k in range(4)]
    encoder = Encoder(PROCESSOR, tiny_clip.PROCESSOR.tokenizer)
    one = MinimalPairs(encoder, pairs)
    images, texts = one.inputs
    right = np.array([[1.0, 0.0], [0.0, 1.0]])
    both_first = np.array([[1.0, 0.0], [0.9, 0.1]])
    embeddings = {}
    for k, pair in enumerate(pairs):
        cosines = right if k in (0, 1, 2) else both_first
        for side in range(2):
            embeddings[images.ids[2 * k + side]] = np.pad(cosines[side], (2 * k, 6 - 2 * k))
            embeddings[texts.ids[2 * k + side]] = np.eye(8)[2 * k + side]
            assert pair.statements[side] in texts.ids[2 * k + side]
    assert one.numbers(embeddings) == {"count": 1.0, "colour": 0.5, "mean": 0.75}


def test_pairs_and_facts_leave_the_other_records_as_they_are():
    settings = {"seed": 3, "length": 16, "singles": 4, "objects": 3}
    plain = training_source(32, **settings)
    mixed = training_source(32, **settings, pairs=2, facts=True)
    for k in range(4):  # the single objects come first in every eight
        np.testing.assert_array_equal(mixed[k].image, plain[k].image)
        assert mixed[k].captions[:3] == plain[k].captions
    assert all(record.id.startswith("pair-") for record in (mixed[6], mixed[7], mixed[14]))
    assert mixed[6].captions != mixed[7].captions
    assert mixed[6].id[:-1] == mixed[7].id[:-1]
    assert any(len(mixed[k].captions) == 4 for k in range(6))
    with pytest.raises(ConfigError, match="together at most 8, found 7 and 2"):
        training_source(32, **settings | {"singles": 7}, pairs=2)
