"""GiVE's evaluation of a model: plan, encode block by block, score.

Naming beside its copy floor, deciding per candidate, retrieval in all directions, copy diagnostics;
all also for the backbone without instructions.

There is no predictions file (`evals.runner`): each image has an embedding under each instruction,
512 million numbers for 1,000 images, 1,000 classes and a width of 512. They are scored block by
block and not kept; an evaluation that was stopped begins anew.

Letters: N images, S image side, E embedding width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from perception_jax.data.records import Source
from perception_jax.errors import ConfigError
from perception_jax.evals.conditioned import prompts
from perception_jax.evals.conditioned.accumulate import (
    TOP,
    Accumulator,
    Measured,
    Needs,
    TextEmbeddings,
)
from perception_jax.evals.conditioned.annotations import OVERLOOKED_SHARE, Annotations
from perception_jax.evals.conditioned.plan import Plan, block_pairs, make_plan
from perception_jax.evals.conditioned.results import (
    ACCURACY_KS,
    RECALL_KS,
    ConditionedResults,
    results,
)
from perception_jax.inference.batches import Batched, divisible, in_parts
from perception_jax.inference.pairs import BatchedPairs, ImageTextPairs
from perception_jax.inference.pixels import Pixels
from perception_jax.nn.adapters import AdapterParam
from perception_jax.shard.mesh import mesh_of
from perception_jax.systems.give.encode import Conditioned, ConditionedEncoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings of an evaluation.

    Attributes:
      batch_size: rows per device call, over all devices.
      block_bytes: for the conditioned embeddings that are held at a time.
      retrieval: whether to score retrieval, or only naming and deciding.
      top: images that the second stage of two-stage retrieval looks at.
      overlooked_share: objects below this share of their image's area count as overlooked.
      recall_ks, accuracy_ks: ranks up to which a right item counts; 1 is among them.

    Raises:
      ConfigError: no 1 among the ranks.
    """

    batch_size: int = 64
    block_bytes: int = 2_000_000_000
    retrieval: bool = True
    top: int = TOP
    overlooked_share: float = OVERLOOKED_SHARE
    recall_ks: tuple[int, ...] = RECALL_KS
    accuracy_ks: tuple[int, ...] = ACCURACY_KS

    def __post_init__(self) -> None:
        for name in ("recall_ks", "accuracy_ks"):
            ks = getattr(self, name)
            if 1 not in ks or min(ks) < 1:
                raise ConfigError(f"{name}: expected ranks from 1 on, 1 among them, found {ks}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What steering costs.

    Attributes:
      added_parameters: that the adapters and heads add to the backbone.
      ms_per_image: of one conditioned pass, end to end; None if nothing could be timed.
      images_per_second_per_chip: the same per device.
      devices: that shared the work.
    """

    added_parameters: int
    ms_per_image: float | None
    images_per_second_per_chip: float | None
    devices: int

    def describe(self) -> str:
        """One line."""
        speed = "not timed (one step only)"
        if self.ms_per_image is not None:
            speed = (
                f"{self.ms_per_image:.2f} ms per image, {self.images_per_second_per_chip:,.1f} "
                f"images/s per chip on {self.devices}"
            )
        return f"cost        {self.added_parameters:,} added parameters, {speed}"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Evaluated:
    """The scores, what they were made of, and what they took."""

    report: ConditionedResults
    measured: Measured
    plan: Plan
    cost: Cost


class Evaluation:
    """Evaluates a model with and without instructions; an evaluator of a training task.

    Attributes:
      annotations: of the images.
      records: of the images, in their order, for pictures; None if there are none.
      config: see there.
    """

    def __init__(
        self,
        encoder: ConditionedEncoder,
        annotations: Annotations,
        pixels: Pixels,
        *,
        blank: UInt8[np.ndarray, "S S 3"],
        records: Source | None = None,
        config: EvaluationConfig | None = None,
        log: Callable[[str], None] = print,
    ):
        """Args:
          pixels: in the order of the annotations.
          blank: what stands for an image without content; see `inference.pixels.blank_image`.
          log: takes the plan and the cost.

        Raises:
          ConfigError: pixels and annotations differ in number.
        """
        if len(pixels) != annotations.count:
            raise ConfigError(
                f"expected one image for each of {annotations.count} annotated ones, found "
                f"{len(pixels)}; annotations and images must be of the same records"
            )
        self.annotations, self.records = annotations, records
        self.config = config or EvaluationConfig()
        self._encoder, self._pixels, self._blank, self._log = encoder, pixels, blank, log
        self._static = Batched(encoder.static, batch_size=self.config.batch_size)
        self._conditioned = BatchedPairs(encoder.conditioned, batch_size=self.config.batch_size)

    def plan(self, model: nnx.Module, mesh: Mesh | None = None) -> Plan:
        """What `run` will do; runs nothing on the device."""
        mesh = mesh or mesh_of(model)
        image = jax.ShapeDtypeStruct(self._blank.shape, np.uint8)
        return make_plan(
            self.annotations,
            Needs(self.annotations, retrieval=self.config.retrieval),
            width=self._static.lower(model, image, mesh).out_info.shape[1],
            batch_size=divisible(self.config.batch_size, mesh),
            block_bytes=self.config.block_bytes,
        )

    def run(self, model: nnx.Module, mesh: Mesh | None = None) -> Evaluated:
        """Prints the plan, encodes and scores.

        Args:
          mesh: rows are split over its batch axes; None takes the one that the model lies on.
        """
        mesh = mesh or mesh_of(model)
        plan = self.plan(model, mesh)
        self._log(plan.describe())
        self._conditioned.seconds, self._conditioned.timed = 0.0, 0
        notes = self.annotations
        images = in_parts(self._pixels.stream(np.arange(notes.count)), plan.batch_size)
        accumulator = Accumulator(
            notes,
            self._texts(model, mesh),
            self._static.stream(model, images, mesh),
            retrieval=self.config.retrieval,
            top=self.config.top,
        )
        states = self._encoder.instructions(model, notes.instructions, mesh)
        for block in plan.blocks:
            pairs = block_pairs(accumulator.needs, block, notes.count)
            found = self._conditioned(
                model,
                self._pixels,
                states,
                pairs,
                extra=self._blank,
                images_per_call=plan.images_per_call,
                mesh=mesh,
            )
            _fold(accumulator, pairs, found)
        measured = accumulator.finish()
        cost = _cost(model, self._conditioned, 1 if mesh is None else mesh.size)
        self._log(cost.describe())
        ks = {"recall_ks": self.config.recall_ks, "accuracy_ks": self.config.accuracy_ks}
        scores = results(measured, **ks)
        return Evaluated(report=scores, measured=measured, plan=plan, cost=cost)

    def __call__(self, model: nnx.Module, mesh: Mesh | None = None) -> Mapping[str, float]:
        """The main numbers, to log while training."""
        return main_numbers(self.run(model, mesh).report)

    def _texts(self, model: nnx.Module, mesh: Mesh | None) -> TextEmbeddings:
        def encode(texts: list[str]) -> np.ndarray:
            return self._encoder.texts(model, texts, mesh)

        names = [kind.name for kind in self.annotations.classes]
        rows = prompts.prototypes(encode, names)
        captions = self.annotations.captions.texts
        empty = np.zeros((0, rows.shape[1]), rows.dtype)
        return TextEmbeddings(prototypes=rows, captions=encode_distinct(encode, captions, empty))


def _cost(model: nnx.Module, conditioned: BatchedPairs, devices: int) -> Cost:
    seconds, passes = conditioned.seconds, conditioned.timed
    timed = passes > 0 and seconds > 0
    leaves = jax.tree.leaves(nnx.state(model, AdapterParam))
    return Cost(
        added_parameters=sum(leaf.size for leaf in leaves),
        ms_per_image=1000 * seconds / passes if timed else None,
        images_per_second_per_chip=passes / seconds / devices if timed else None,
        devices=devices,
    )


def encode_distinct(
    encode: Callable[[list[str]], np.ndarray],
    texts: tuple[str, ...],
    empty: Float[np.ndarray, "0 E"],
) -> Float[np.ndarray, "n E"]:
    """Embeds each distinct text once, so that equal texts have equal embeddings."""
    if not texts:
        return empty
    distinct, place = np.unique(np.array(texts, object), return_inverse=True)
    return np.asarray(encode(distinct.tolist()))[place]


def main_numbers(scores: ConditionedResults) -> dict[str, float]:
    """A few numbers of a report by flat name; those without a query are left out."""
    found: dict[str, Any] = {}
    for name in ("presence", "static", "blank"):
        for stratum in ("all", "overlooked"):
            found[f"l_map_{name}_{stratum}"] = scores.l_protocol[name][stratum]["map"]
    for name in ("conditioned", "copy_floor"):
        found[f"p_acc1_{name}"] = scores.p_protocol[name]["all"]["acc@1"]
    for task in ("text_to_image", "image_to_text", "image_to_image"):
        part = getattr(scores, task)
        if part is not None:
            for name in ("conditioned", "static"):
                found[f"{task}_r1_{name}_overlooked"] = part[name]["overlooked"]["r@1"]
    if scores.image_to_text is not None:
        for name in ("conditioned", "static", "blank"):
            found[f"same_class_r1_{name}"] = scores.image_to_text[name]["all"]["same_class_r@1"]
    seen = scores.diagnostics
    found |= {key: seen[key] for key in ("cosine_present", "cosine_absent", "cosine_blank")}
    for name in ("oid_auc", "static_auc", "blank_auc"):
        found |= {f"{name}_{stratum}": seen[name][stratum] for stratum in ("all", "overlooked")}
    return {key: float(value) for key, value in found.items() if value is not None}


def _fold(accumulator: Accumulator, pairs: ImageTextPairs, found: Conditioned) -> None:
    """Hands each gallery of a block to the scores; its last row is the blank image."""
    order = np.argsort(pairs.text, kind="stable")
    starts = np.flatnonzero(np.diff(pairs.text[order], prepend=-1))
    for mine in np.split(order, starts[1:]):
        embedding = np.asarray(found.embedding[mine], np.float32)
        accumulator.add(
            int(pairs.text[mine[0]]),
            pairs.image[mine[:-1]],
            embedding[:-1],
            np.asarray(found.presence[mine[:-1]], np.float32),
            embedding[-1],
            float(found.presence[mine[-1]]),
        )
