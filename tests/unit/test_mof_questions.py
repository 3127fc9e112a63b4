"""Exact answers to test questions, kept features in training, images of another size."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perception_jax import api
from perception_jax.api.loading import prepare_tower
from perception_jax.api.multimodal import tower_at
from perception_jax.data.conversation import IGNORE
from perception_jax.data.grouping import Division
from perception_jax.data.image_chats import FEATURES, IMAGES
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Question
from perception_jax.errors import ConfigError, DataError
from perception_jax.models.llava.config import tower_vision
from perception_jax.models.params import flatten, unflatten
from perception_jax.models.registry import architecture_of
from perception_jax.systems.mof.answers import ExactAnswers
from perception_jax.systems.mof.features import (
    compare_images,
    kept_features,
    opened_features,
    write_features,
)
from perception_jax.systems.mof.scene_results import majority
from perception_jax.systems.mof.task import MofTask, chat_predictions
from perception_jax.testing import tiny_llava
from tests.tiny_chats import Chats, chat
from tests.tiny_mof import batches, chats, task


def asked(count: int) -> Chats:
    """Single questions of two kinds, in pairs of one kind."""
    words = ("cat", "hat")
    records = (
        chat(f"q{k}", "<image>\nthe", words[k % 2], images=1, colour=20 * k) for k in range(count)
    )
    kinds = ("count", "colour")
    return Chats(
        tuple(
            dataclasses.replace(
                record, questions=(Question(text="the", answers=("x",), kind=kinds[k // 2 % 2]),)
            )
            for k, record in enumerate(records)
        )
    )


def evaluator(base, records: Chats, **settings) -> ExactAnswers:
    predictions = chat_predictions(batch_size=4, dtype="float32")
    return ExactAnswers(predictions, chats(base, records, order="random"), records, **settings)


def always(base, answer: str):
    """The model, but it continues each token that precedes one of an answer with that one.

    Blocks do nothing, so that the state of a token is its embedding; the head compares it with
    those of the tokens before the answer's.
    """
    (batch,) = [*chats(base, Chats((chat("a", "<image>\nthe", answer, images=1),))).parts(1)]
    ids, label = batch["ids"][0], batch["label"][0]
    places = np.flatnonzero(label != IGNORE)
    leaves = dict(flatten(base.model))
    for path in leaves:
        if path.endswith(("out_proj/kernel", "down/kernel")) and path.startswith("language"):
            leaves[path] = jnp.zeros_like(leaves[path])
    table = jax.random.normal(jax.random.key(0), leaves["language/token_embedding"].shape)
    head = np.zeros(leaves["language/lm_head/kernel"].shape, np.float32)
    for place in places:
        head[:, ids[place]] += np.asarray(table)[ids[place - 1]]
    leaves |= {"language/token_embedding": table, "language/lm_head/kernel": jnp.asarray(head)}
    return unflatten(base.model, leaves)


def test_an_answer_is_exact_if_all_its_tokens_lead_and_pairs_if_both_are():
    base = tiny_llava.loaded(tiny_llava.IMOF)
    records = asked(8)
    model = always(base, "cat")
    np.testing.assert_array_equal(evaluator(base, records).rows(model), [True, False] * 4)
    found = evaluator(base, records)(model)
    assert found == {"accuracy": 0.5, "colour": 0.5, "count": 0.5}
    assert evaluator(base, records, together=2)(model)["accuracy"] == 0.0
    cats = Chats(tuple(records.records[k // 2 * 2] for k in range(6)) + records.records[6:])
    found = evaluator(base, cats, together=2)(model)
    assert found == {"accuracy": 0.75, "colour": 0.5, "count": 1.0}


def test_a_record_that_cannot_be_read_is_no_right_answer():
    base = tiny_llava.loaded(tiny_llava.IMOF)
    broken = dataclasses.replace(asked(8).records[2], images=(b"no image",))
    records = Chats((*asked(8).records[:2], broken, *asked(8).records[3:]))
    data = chats(base, records, order="random", max_bad_fraction=0.5)
    predictions = chat_predictions(batch_size=4, dtype="float32")
    found = ExactAnswers(predictions, data, records).rows(always(base, "cat"))
    np.testing.assert_array_equal(found, [True, False, False, False, *[True, False] * 2])


def test_the_most_frequent_answer_of_each_kind():
    records = Chats((*asked(8).records, *asked(8).records[:1]))
    assert majority(records) == {"accuracy": 5 / 9, "colour": 0.5, "count": 3 / 5}


@pytest.mark.parametrize("config", [tiny_llava.IMOF, tiny_llava.CONFIG])
def test_kept_features_train_as_images_do(tmp_path, config):
    one = task(config, order="modality")
    records, base = Chats.made(24), one.base
    kept = kept_features(tmp_path, base, records)
    maker = dataclasses.replace(one.data.transform, features=kept)
    source = chats(base, records, division=Division(rows=2, devices=2), maker=maker)
    other = MofTask(one.config, base, source)
    declared = [
        {key: (leaf.shape, leaf.dtype) for key, leaf in shape.items()}
        for shape in other.batch_shapes()
    ]
    loss = jax.jit(lambda batch: one.loss(base.model, batch, jax.random.key(0))[0])
    with_images = 0
    for batch, same in zip(batches(other, 6), batches(one, 6), strict=True):
        assert {key: (x.shape, x.dtype) for key, x in batch.items()} in declared
        assert IMAGES not in batch
        assert (FEATURES[0] in batch) == (IMAGES in same)
        np.testing.assert_array_equal(batch["ids"], same["ids"])
        np.testing.assert_allclose(loss(batch), loss(same), atol=1e-3)
        with_images += IMAGES in same
    assert 0 < with_images < 6
    (part, *_) = source.parts(4)
    assert FEATURES[0] in part
    missing = chats(base, Chats((chat("x", "<image>\nthe", "cat", images=1),)), maker=maker)
    with pytest.raises(DataError, match="'x', found none"):
        next(iter(missing.loader()))
    # What changed under the same names is found, and what cannot be read is not its business.
    compare_images(kept, base.processor.image, records)
    broken = dataclasses.replace(records[0], images=(b"no image",))
    compare_images(kept, base.processor.image, Chats((broken, *records.records[1:])))
    more = Chats((*records.records, chat("x", "<image>\nthe", "cat", images=1)))
    with pytest.raises(DataError, match="record 'x', found none"):
        compare_images(kept, base.processor.image, more)
    folders = {
        one.folder.parent for found in (kept, kept_features(tmp_path, base, more)) for one in found
    }
    assert len(folders) == 2
    darker = dataclasses.replace(records[8], images=(records[8].images[0] // 2,))
    others = Chats((*records.records[:8], darker))
    with pytest.raises(DataError, match="images of record 'chat8', found those of others"):
        compare_images(kept, base.processor.image, others)


def test_features_of_another_model_are_refused(tmp_path):
    base = tiny_llava.loaded(tiny_llava.IMOF)
    folders = write_features(base, Chats.made(3), tmp_path)
    with pytest.raises(ConfigError, match="for each of 2 image tower"):
        opened_features(folders[:1], base.config)
    with pytest.raises(ConfigError, match=r"expected \[9, 24\] features of hidden state 2, found"):
        opened_features(folders[::-1], base.config)
    deeper = dataclasses.replace(base.config, select_layer=-1)
    with pytest.raises(ConfigError, match=r"of hidden state 3, found .* of 2"):
        opened_features(folders, deeper)
    assert opened_features((), base.config) == ()


@pytest.mark.parametrize("source", ["scenes-clip", "dinov2"])
def test_a_tower_for_images_of_another_size_gives_what_it_gave_them(tmp_path, source):
    if source == "dinov2":
        config = dataclasses.replace(tiny_llava.DINOV2, position_offset=0.0)
        model = architecture_of(config).build(config, rngs=nnx.Rngs(0))
        processor = api.Processor(image=ImageProcessor(size=40), tokenizer=None)
        api.export(api.Loaded(model=model, config=config, processor=processor), tmp_path / "hf")
        source = tmp_path / "hf"
    own = prepare_tower(source)
    size = 2 * tower_vision(own.config).image_size
    found = tower_at(source, size)
    assert tower_vision(found.config).image_size == size
    pixels = jax.random.normal(jax.random.key(0), (1, size, size, 3))
    expected = own.load_weights().model(pixels).tokens
    model = found.load_weights().model
    np.testing.assert_allclose(model(pixels).tokens, expected, atol=1e-5)
    rows = model.position_embedding[...].shape[0]
    assert rows == 1 + (size // tower_vision(own.config).patch_size) ** 2
    assert tower_at(source, None).config == own.config
    with pytest.raises(ConfigError, match="expected a multiple of"):
        tower_at(source, size + 1)
