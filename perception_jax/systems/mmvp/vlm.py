"""MMVP-VLM for a model with an image and a text tower; predictions are kept as they are made.

Letters: B batch, S image side, T text tokens, E embedding width.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from perception_jax.api import Loaded
from perception_jax.errors import ConfigError, DataError
from perception_jax.evals import runner
from perception_jax.evals.predictions import Prediction, text_of, vector_of
from perception_jax.evals.vqa import mmvp_vlm
from perception_jax.inference.batches import Batched
from perception_jax.nn.towers import TwoTowers
from perception_jax.ops.losses import unit
from perception_jax.systems.mmvp.embed import ImageEmbedder, exact

_PAIRS_AT_ONCE = 8


@dataclasses.dataclass(frozen=True, eq=False)
class VlmRun:
    """The benchmark on one model.

    Attributes:
      loaded: has two towers and a tokenizer.
      pairs: of `mmvp_vlm.read_pairs`.
      mesh: devices that share a batch.
    """

    loaded: Loaded
    pairs: Sequence[mmvp_vlm.Pair]
    mesh: Mesh | None = None

    def __call__(self, folder: pathlib.Path) -> mmvp_vlm.VlmScores:
        """Predicts what the folder does not hold, and scores all.

        The prediction for a statement is the vector of its cosines with both images.

        Raises:
          ConfigError: the model has no text tower.
          DataError: the folder holds predictions of another model, or an image cannot be read.
        """
        if not isinstance(self.loaded.model, TwoTowers):
            raise ConfigError(
                f"{self.loaded.name}: expected a model with an image and a text tower, found "
                f"{type(self.loaded.model).__name__}: MMVP-VLM compares images with statements."
            )
        embed = ImageEmbedder(self.loaded, batch=2 * _PAIRS_AT_ONCE, mesh=self.mesh)
        ids = [f"{place}: {qid}" for place, pair in enumerate(self.pairs) for qid in pair.ids]
        model_id = f"{self.loaded.name}#{embed.fingerprint()}"
        runner.predict(
            ids, lambda left: self._run(embed, ids, left, model_id), folder, model_id=model_id
        )
        rows = np.stack([vector_of(one.output) for one in runner.predicted(ids, folder)])
        if rows.shape[1:] != (2,):
            raise DataError(f"{folder}: expected two cosines a prediction, found {rows.shape[1]}.")
        scale = float(self.loaded.model.logit_scale[...])
        return mmvp_vlm.score([pair.ids for pair in self.pairs], rows.reshape(-1, 2, 2), scale)

    def _run(
        self, embed: ImageEmbedder, ids: Sequence[str], left: Sequence[int], model_id: str
    ) -> Iterator[Prediction]:
        wanted = sorted({row // 2 for row in left})
        rows, encode = set(left), Batched(_embed_texts, batch_size=2 * _PAIRS_AT_ONCE)
        for start in range(0, len(wanted), _PAIRS_AT_ONCE):
            some = wanted[start : start + _PAIRS_AT_ONCE]
            pairs = [self.pairs[k] for k in some]
            pixels = [embed.processor.read(image).pixels for one in pairs for image in one.images]
            tokens = self.loaded.processor.texts([text for one in pairs for text in one.texts])
            images = embed(np.stack(pixels)).reshape(len(some), 2, -1)
            texts = encode(self.loaded.model, np.asarray(tokens), self.mesh)
            cosines = mmvp_vlm.cosines_of(images, texts.reshape(len(some), 2, -1))
            for k, pair, both in zip(some, pairs, cosines, strict=True):
                for which in (0, 1):
                    if 2 * k + which in rows:
                        yield Prediction(
                            id=ids[2 * k + which],
                            prompt=pair.texts[which],
                            output=text_of(both[which]),
                            model_id=model_id,
                        )


def _embed_texts(model: nnx.Module, ids: Int[Array, "B T"]) -> Float[Array, "B E"]:
    with exact():
        return unit(model.text(ids).embedding.astype(jax.numpy.float32))
