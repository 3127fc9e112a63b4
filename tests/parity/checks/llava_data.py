"""Golden checks of `data.image_chats` and `data.grouping`: LLaVA's dataset and sampler."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np

from perception_jax.data.conversation import IGNORE, IMAGE, TEMPLATES
from perception_jax.data.grouping import IMAGE_WORDS, RowShape, modality_order
from perception_jax.data.image_chats import ImageChatTransform, signed_words
from perception_jax.data.planned import Row
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Record, Turn
from perception_jax.ops.image import normalise
from tests.parity.cases import Case, check
from tests.parity.checks.conversations import NAMES, ROLES, ToyTokenizer

MODES = {"pad": "llava_pad", "square": "hf_crop", None: "hf_crop"}
"""Our modes of preprocessing by LLaVA's `image_aspect_ratio`."""


def record(case: Case, row: dict) -> Record:
    """A row of `data.json`; its image is an array of the case."""
    turns = (Turn(role=ROLES[one["from"]], text=one["value"]) for one in row["conversations"])
    images = (case.arrays[f"raw.{row['image']}"],) if "image" in row else ()
    return Record(id=str(row["id"]), images=images, conversation=tuple(turns))


@check("mmvp_mof", when=lambda case: case.name.startswith("sft_batch"))
def sft_batch(case: Case) -> None:
    settings, arrays = case.settings, case.arrays
    toy = settings["toy_tokenizer"]
    assert (settings["ignore_index"], settings["image_token_index"]) == (IGNORE, IMAGE)
    assert (settings["clip_resize"], settings["clip_crop"]) == ("shortest_edge", "center")
    assert toy["padding_side"] == "right"
    assert not settings["mm_use_im_start_end"]
    vocab = json.loads((case.directory / toy["vocab_file"]).read_text())
    transform = ImageChatTransform(
        tokenizer=ToyTokenizer(toy, vocab),
        processor=ImageProcessor(
            size=settings["image_size"],
            mode=MODES[settings.get("image_aspect_ratio")],
            exif=False,
            alpha="drop",
        ),
        template=TEMPLATES[NAMES.get(settings["template"], settings["template"])],
        vocab_size=len(vocab),
        max_length=settings["model_max_length"],
        image_tokens=1,
    )
    rows = [record(case, row) for row in json.loads((case.directory / "data.json").read_text())]
    words = np.array([signed_words(row) for row in rows])
    np.testing.assert_array_equal(words, arrays["modality_lengths"])
    plain = np.abs(words) + IMAGE_WORDS * (words > 0)
    np.testing.assert_array_equal(plain, arrays["lengths"])
    expected = arrays["input_ids"]
    shape = RowShape(expected.shape[1], True)
    assert max(transform.size(transform.encode(row)) for row in rows) == shape.length
    for number, row in enumerate(rows):
        found = transform(
            transform.read(row, shape), Row(record=number, group=0, seed=(0,), shape=shape)
        )
        np.testing.assert_array_equal(found["ids"], expected[number])
        np.testing.assert_array_equal(found["label"], arrays["labels"][number])
        np.testing.assert_array_equal(found["id_mask"], arrays["attention_mask"][number])
        (pixels,) = found["image"]
        if row.images:
            processor = transform.processor
            values = np.asarray(normalise(jnp.asarray(pixels), processor.mean, processor.std))
            values = values.transpose(2, 0, 1)
            np.testing.assert_allclose(values, arrays["images"][number], rtol=0, atol=1e-6)
        else:  # the reference's zeros are normalised ones; neither is looked at
            assert not pixels.any()
            assert not arrays["images"][number].any()


@check("mmvp_mof", when=lambda case: case.name.startswith("modality_sampler"))
def modality_sampler(case: Case) -> None:
    settings, arrays = case.settings, case.arrays
    recorded = [arrays[f"perm_{name}"] for name in ("mm", "lang", "megabatch")]

    def permute(count: int) -> np.ndarray:
        drawn = recorded.pop(0)
        assert len(drawn) == count
        return drawn

    order = modality_order(
        arrays["modality_lengths"],
        rows=settings["batch_size"],
        devices=settings["world_size"],
        permute=permute,
    )
    np.testing.assert_array_equal(order, arrays["indices"])
    assert not recorded
