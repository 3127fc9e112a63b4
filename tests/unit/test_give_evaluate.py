"""The block-planned evaluation: every pass once, the same numbers for any batch, block and mesh."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.give.common import ABLATIONS, ablation
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import ObjectAnnotation, ObjectInstruction, Record
from perception_jax.errors import ConfigError, DataError
from perception_jax.evals.conditioned import prompts
from perception_jax.evals.conditioned.accumulate import Accumulator, Needs, TextEmbeddings
from perception_jax.evals.conditioned.annotations import (
    ABSENT,
    PRESENT,
    UNKNOWN,
    Annotations,
    Captions,
    EvaluatedClass,
    Pairs,
)
from perception_jax.evals.conditioned.plan import block_pairs, make_plan
from perception_jax.evals.conditioned.results import results
from perception_jax.evals.two_stage import search
from perception_jax.inference.batches import Batched
from perception_jax.inference.pairs import BatchedPairs
from perception_jax.inference.pixels import PixelsInMemory, PixelsOfSource, blank_image
from perception_jax.nn.adapters import AdapterParam
from perception_jax.shard import distributed
from perception_jax.shard.mesh import make_mesh
from perception_jax.systems.give.adapter import AdapterConfig
from perception_jax.systems.give.encode import Conditioned, ConditionedEncoder
from perception_jax.systems.give.evaluation.evaluate import (
    Evaluation,
    EvaluationConfig,
    main_numbers,
)
from perception_jax.systems.give.losses import LossConfig

SIDE, WIDTH, COUNT = 2, 8, 13
PROCESSOR = ImageProcessor(size=SIDE)


class Weights(nnx.Module):
    """Whole numbers, so that sums do not depend on their order."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.kernel = nnx.Param(jnp.asarray(rng.integers(1, 9, (SIDE * SIDE * 3, WIDTH))))
        self.adapter = AdapterParam(jnp.ones((3, 5)))


class Fake(ConditionedEncoder):
    """Embeds exactly; notes what it was asked."""

    def __init__(self):
        self.traces = collections.Counter()
        self.meshes: dict[str, int] = {}
        self.asked: list[str] = []

    def texts(self, model, texts, mesh=None):
        self.asked.extend(texts)
        sums = [[sum(text.encode()) * (k + 3) % 7 - 3.1 for k in range(WIDTH)] for text in texts]
        return np.array(sums, np.float32)

    def instructions(self, model, texts, mesh=None):
        return jnp.asarray([sum(text.encode()) for text in texts])

    def static(self, model, pixels):
        self.traces["static"] += 1
        self.meshes["static"] = jax.sharding.get_abstract_mesh().size
        return self._embed(model, pixels, jnp.zeros(len(pixels), int))

    def conditioned(self, model, pixels, image, instructions, instruction):
        self.traces["conditioned"] += 1
        self.meshes["conditioned"] = jax.sharding.get_abstract_mesh().size
        embedding = self._embed(model, pixels[image], instructions[instruction])
        return Conditioned(embedding=embedding, presence=embedding[:, 0] * 2)

    def _embed(self, model, pixels, steer):
        flat = pixels.reshape(len(pixels), -1).astype(jnp.int32) + steer[:, None]
        return (flat @ model.kernel[...] % 11 - 5.5).astype(jnp.float32)


def make_records(seed: int = 0) -> list[Record]:
    rng = np.random.default_rng(seed)
    names = [one.name for one in CLASSES]

    def thing(image: int, number: int) -> ObjectAnnotation:
        return ObjectAnnotation(
            name=names[rng.integers(5)],
            box=(0.0, 0.0, float(rng.integers(1, 90)), 1.0),
            captions=(f"text {image} {number}",),
        )

    return [
        Record(
            id=str(k),
            images=(np.zeros((2, 2, 3), np.uint8),),
            size=(10, 10),
            objects=tuple(thing(k, j) for j in range(count)),
            instructions=tuple(
                ObjectInstruction(text=f"the one of {k}", target=j)
                for j in range(count)
                if rng.random() < 0.2
            ),
            absent=tuple(name for name in names if rng.random() < 0.5),
        )
        for k, count in enumerate(rng.integers(1, 4, COUNT))
    ]


CLASSES = [EvaluatedClass(name=name) for name in ("cup", "dog", "kite", "sock", "tv_(set)")]
PIXELS = np.random.default_rng(1).integers(0, 256, (COUNT, SIDE, SIDE, 3), np.uint8)
BLANK = blank_image(PROCESSOR)


@pytest.fixture(params=[False, True], ids=["complete", "federated"])
def notes(request) -> Annotations:
    return Annotations.build(make_records(), CLASSES, federated=request.param)


def whole(notes: Annotations, *, retrieval: bool = True) -> dict:
    """The report without blocks or batches: all images under all instructions at once."""
    fake, model = Fake(), Weights()
    states = fake.instructions(model, notes.instructions)
    names = [kind.name for kind in notes.classes]
    texts = TextEmbeddings(
        prototypes=prompts.prototypes(lambda t: fake.texts(model, t), names),
        captions=fake.texts(model, notes.captions.texts),
    )
    static = np.asarray(fake.static(model, jnp.asarray(PIXELS)))
    accumulator = Accumulator(notes, texts, static, retrieval=retrieval, top=4)
    pixels = jnp.concatenate([PIXELS, BLANK[None]])
    for u in accumulator.needs.made.tolist():
        index = jnp.full(COUNT + 1, u)
        out = fake.conditioned(model, pixels, jnp.arange(COUNT + 1), states, index)
        embedding, presence = np.asarray(out.embedding), np.asarray(out.presence)
        accumulator.add(
            u, np.arange(COUNT), embedding[:-1], presence[:-1], embedding[-1], float(presence[-1])
        )
    return results(accumulator.finish()).to_dict()


def evaluation(notes: Annotations, fake: Fake, **config) -> Evaluation:
    settings = EvaluationConfig(**{"batch_size": 8, "top": 4, **config})
    lines: list[str] = []
    pixels = config.pop("pixels", PixelsInMemory(PIXELS))
    made = Evaluation(fake, notes, pixels, blank=BLANK, config=settings, log=lines.append)
    made.lines = lines
    return made


@pytest.mark.parametrize(
    ("devices", "config"),
    [
        (1, {"batch_size": 5, "block_bytes": 1}),
        (1, {"batch_size": 1, "block_bytes": 1500}),
        (8, {"batch_size": 16, "block_bytes": 10**9}),
        (1, {"batch_size": 64, "retrieval": False}),
    ],
)
def test_blocks_batches_and_devices_change_nothing(notes, devices, config):
    mesh = make_mesh(2, 2, 2) if devices == 8 else None
    fake = Fake()
    one = evaluation(notes, fake, **config)
    found = one.run(Weights(), mesh)
    assert found.report.to_dict() == whole(notes, retrieval=config.get("retrieval", True))
    assert dict(fake.traces) == {
        "static": 1,
        "conditioned": 1,
    }  # one shape each, whatever the block
    if devices > 1:  # so that towers constrain their activations
        assert fake.meshes == {"static": devices, "conditioned": devices}
    assert found.cost.added_parameters == 15
    assert found.cost.devices == devices
    assert len(one.lines) == 2
    numbers = main_numbers(found.report)
    assert numbers["p_acc1_copy_floor"] == found.report.p_protocol["copy_floor"]["all"]["acc@1"]


def test_an_evaluation_on_several_processes_can_be_left_in_any_call(notes):
    """`needed` stands for the other processes."""
    mesh, one, model = make_mesh(2, 2, 2), evaluation(notes, Fake(), batch_size=16), Weights()
    ballots = distributed.Ballots(mesh, needed=True)

    def poll(answers: Iterator[bool]) -> contextlib.AbstractContextManager[None]:
        asked = functools.partial(next, answers)
        return distributed.polling(distributed.Poll(ballots, asked, KeyboardInterrupt))

    numbers = itertools.count()
    with poll(number < 0 for number in numbers):
        assert one.run(model, mesh).report.to_dict() == whole(notes)
    calls = next(numbers)
    for last in (0, calls - 1):  # without an instruction, and under the last one
        with poll(number == last for number in range(calls)), pytest.raises(KeyboardInterrupt):
            one.run(model, mesh)


class Counting:
    """Pixels that note each reading."""

    def __init__(self):
        self.read = 0

    def __len__(self):
        return COUNT

    def stream(self, indices):
        for index in indices:
            self.read += 1
            yield PIXELS[index]


def test_the_plan_is_what_happens(notes):
    fake, pixels, seen = Fake(), Counting(), collections.Counter()
    config = EvaluationConfig(batch_size=4, block_bytes=2000)
    one = Evaluation(fake, notes, pixels, blank=BLANK, config=config, log=lambda line: None)
    plan = one.plan(Weights())
    assert (pixels.read, fake.asked) == (0, [])  # planning reads and computes nothing

    class Watched(BatchedPairs):
        def __call__(self, model, images, texts, pairs, **more):
            seen.update(zip(pairs.image.tolist(), pairs.text.tolist(), strict=True))
            out = super().__call__(model, images, texts, pairs, **more)
            assert out.embedding.nbytes + out.presence.nbytes <= 2000
            return out

    one._conditioned = Watched(fake.conditioned, batch_size=4)
    one.run(Weights())
    assert len(plan.blocks) > 1
    assert pixels.read == plan.image_reads
    assert set(seen.values()) == {1}  # a gallery is made once
    assert len(seen) == plan.conditioned_passes
    needs = Needs(notes)
    expected = {(i, u) for u in needs.made.tolist() for i in needs.images[u].tolist()}
    blank = {(COUNT, u) for u in needs.made.tolist()}
    assert set(seen) == expected | blank
    assert plan.instructions == len(blank)
    assert len(fake.asked) == len(set(fake.asked))
    assert "conditioned" in plan.describe()


def test_a_large_evaluation_never_holds_its_galleries():
    """Federated: 20,000 images x 1,200 classes, planned without encoding."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 1200, (20_000, 12))  # of each image, four present, then eight absent
    labels = np.full((20_000, 1200), UNKNOWN, np.int8)
    np.put_along_axis(labels, kinds[:, 4:], ABSENT, axis=1)
    np.put_along_axis(labels, kinds[:, :4], PRESENT, axis=1)
    image, class_id = np.nonzero(labels == PRESENT)
    none = np.zeros(0, int)
    notes = Annotations(
        classes=tuple(EvaluatedClass(name=f"name {k}") for k in range(1200)),
        image_ids=tuple(map(str, range(20_000))),
        labels=labels,
        pairs=Pairs(image, class_id, np.ones(len(image), np.int8), class_id),
        captions=Captions((), none, none),
        instructions=tuple(f"the name {k}" for k in range(1200)),
        class_instruction=np.arange(1200),
    )
    plan = make_plan(notes, Needs(notes), width=512, batch_size=256, block_bytes=10**8)
    assert plan.conditioned_passes == np.count_nonzero(labels != UNKNOWN) + 1200
    assert plan.gallery_bytes <= 10**8 < plan.whole_bytes
    assert plan.padded_passes < len(plan.blocks) * 256 + 256
    assert len(plan.blocks) == -(-plan.whole_bytes // 10**8)


def test_images_of_a_call_are_counted():
    needs = Needs(Annotations.build(make_records(), CLASSES, federated=True))
    pairs = block_pairs(needs, needs.made.tolist(), COUNT)
    assert np.all(np.diff(pairs.image) >= 0)
    for batch in (1, 3, 7, 100):
        parts = np.split(pairs.image, range(batch, len(pairs.image), batch))
        assert pairs.images_per_call(batch) == max(len(np.unique(part)) for part in parts)


class Pictures:
    """Records whose images are already of the model's size."""

    def __init__(self, broken: int | None = None):
        self.broken = broken

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        picture = b"no image" if index == self.broken else PIXELS[index]
        return Record(id=f"picture {index}", images=(picture,))


def test_images_are_read_from_their_source_for_every_block():
    notes = Annotations.build(make_records(), CLASSES, federated=True)
    config = EvaluationConfig(batch_size=4, block_bytes=2000, top=4)
    pixels = PixelsOfSource(Pictures(), PROCESSOR)
    one = Evaluation(Fake(), notes, pixels, blank=BLANK, config=config, log=lambda line: None)
    assert one.run(Weights()).report.to_dict() == whole(notes)
    assert list(pixels.stream(np.arange(0))) == []
    broken = PixelsOfSource(Pictures(broken=3), PROCESSOR)
    with pytest.raises(DataError, match="picture 3"):
        list(broken.stream(np.array([1, 3, 5])))


def test_objects_that_the_crop_cuts_away_are_left_out_and_counted():
    """Of a 40 x 20 image the middle square is left."""

    def at(left: float, name: str, **more) -> ObjectAnnotation:
        return ObjectAnnotation(name=name, box=(left, 0.0, left + 4.0, 4.0), **more)

    objects = (at(0.0, "cup"), at(9.0, "dog"), at(7.0, "kite"), at(15.0, "fox"))
    objects += (at(36.0, "dog"), at(0.0, "sock", crowd=True), at(15.0, "tv"))
    record = Record(id="0", images=(np.zeros((20, 40, 3), np.uint8),), objects=objects)
    names = ("cup", "dog", "kite", "sock", "tv", "cat")
    classes = [EvaluatedClass(name=name) for name in names]
    found = Annotations.read([record], classes, federated=False, processor=PROCESSOR)
    assert found.cropped == 3  # the cup, the kite and one of the dogs
    assert found.labels[0].tolist() == [-1, 1, -1, -1, 1, 0]
    # Half of an object is enough.
    half = Record(id="0", images=(record.image,), objects=(at(8.0, "cup"),))
    exact = ImageProcessor(size=20)
    assert Annotations.read([half], classes, federated=False, processor=exact).cropped == 0


def test_what_does_not_fit_is_refused_before_anything_runs():
    notes = Annotations.build(make_records(), CLASSES, federated=True)
    with pytest.raises(ConfigError, match="13 annotated ones, found 12"):
        Evaluation(Fake(), notes, PixelsInMemory(PIXELS[:12]), blank=BLANK)
    with pytest.raises(ConfigError, match="batch_size: expected at least 1, found 0"):
        BatchedPairs(Fake().conditioned, batch_size=0)


def test_a_batch_that_the_mesh_does_not_divide_is_enlarged(notes):
    """Six pairs on four batch shards run in calls of eight."""
    one = evaluation(notes, Fake(), batch_size=6)
    mesh = make_mesh(2, 2, 2)
    assert one.plan(Weights(), mesh).batch_size == 8
    assert one.run(Weights(), mesh).report.to_dict() == whole(notes)


def test_two_stage_search_reorders_the_best_static_images():
    fake, model = Fake(), Weights()
    encode = BatchedPairs(fake.conditioned, batch_size=4)
    pixels = PixelsInMemory(PIXELS)
    static = Batched(fake.static, batch_size=4)(model, PIXELS)
    states = fake.instructions(model, ["the cup", "the dog"])
    query = fake.texts(model, ["a red cup"])[0]
    found = search(encode, model, pixels, static, query, states, 1, top=5)

    def cosines(rows):
        return rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)

    candidates = np.sort(np.argsort(-cosines(static), kind="stable")[:5])
    rows = fake.conditioned(model, jnp.asarray(PIXELS), candidates, states, jnp.full(5, 1))
    fine = cosines(np.asarray(rows.embedding))
    order = np.argsort(-fine, kind="stable")
    assert found.indices.tolist() == [candidates[order].tolist()]
    np.testing.assert_allclose(found.scores[0], fine[order], atol=1e-6)
    assert not np.array_equal(order, np.arange(5))


def test_ablations_change_settings_that_exist():
    assert len(ABLATIONS) == 13
    assert ablation("full") == {}
    assert ablation("oitc_unstructured") == {
        "losses.oiic": 0.0,
        "losses.oid": 0.0,
        "sampler.grouped": False,
    }
    own = {"adapter.layers", "sampler.grouped", "mask", "instruction"}
    for overrides in ABLATIONS.values():
        for key, value in overrides.items():
            section, _, name = key.partition(".")
            config = {"losses": LossConfig, "adapter": AdapterConfig}.get(section)
            if key not in own:
                assert dataclasses.replace(config(), **{name: value}) != config()
    with pytest.raises(ConfigError, match="no_oid"):
        ablation("no_oid2")


def test_the_blank_image_has_the_mean_colour():
    assert BLANK.shape == (SIDE, SIDE, 3)
    assert (BLANK == (122, 116, 104)).all()  # CLIP's mean, in 1/255
