"""Golden check of a multimodal host: what a method of visual cropping takes out of a LLaVA: its
prompt, attention and its gradient, the gradient of the pixels, and greedy answers."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from perception_jax.data.conversation import image_spans, tokenize_images
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.tokenization import LanguageTokenizer
from perception_jax.generate import IMAGE, Generator, Sampling
from perception_jax.interop.checkpoint_dir import open_checkpoint
from perception_jax.interop.load import load_params
from perception_jax.models.hosts import image_attention
from perception_jax.models.identify import identify
from perception_jax.models.llava.modeling import Llava
from perception_jax.models.params import flatten, unflatten
from perception_jax.nn.taps import Taps
from perception_jax.ops.image import normalise
from tests.parity.cases import Case, assert_close, check

PROMPTS = {"q": "short", "g": "general"}


@check("vicrop", when=lambda case: case.name.startswith("llava_tiny"))
def llava(case: Case) -> None:
    model = load(case)
    config, arrays = model.config, case.arrays
    given = case.settings["processor"]
    processor = ImageProcessor(size=given["size"], exif=False, alpha="drop")
    pixels = processor.read(case.directory / case.settings["image_files"]["standard"])
    images = normalise(jnp.asarray(pixels.pixels)[None, None], processor.mean, processor.std)
    assert_close(images[0].transpose(0, 3, 1, 2), arrays["pixel_values"], what="pixel_values")
    (features,) = jax.jit(lambda m, x: m.image_features(x))(model, images)
    assert_close(features[0], arrays["vision_selected"], what="vision_selected")
    tokens = jax.jit(lambda m, x: m.project((x,)))(model, features)
    assert_close(tokens[0], arrays["image_features"], what="image_features")
    tokenizer = tokenizer_of(case)
    for name, prompt in PROMPTS.items():
        text = case.settings["prompts"][prompt]
        count = [config.tokens_per_image]
        ids = tokenize_images(tokenizer, text, count, image_id=config.image_id)[None]
        expected = arrays[f"input_ids_{name}"]
        np.testing.assert_array_equal(np.where(ids == IMAGE, config.image_id, ids), expected)
        compare_gradients(case, model, images, ids, name)
    steps = case.settings["generation"]["max_new_tokens"]
    sampling = Sampling(end_ids=(case.settings["generation"]["eos_token_id"],))
    ids = np.where(arrays["input_ids_q"] == config.image_id, IMAGE, arrays["input_ids_q"])
    found = Generator(model).generate([*ids], image_tokens=tokens, tokens=steps, sampling=sampling)
    whole = arrays["e2e_rel_att_ids_original"][0, ids.shape[1] :]
    assert found[0].ids == tuple(whole.tolist())


def tokenizer_of(case: Case) -> LanguageTokenizer:
    """The case's `tokenizer.json` with the special tokens that its settings name."""
    given = case.settings["tokenizer"]
    file = (case.directory / given["file"]).read_bytes()
    names = {token["id"]: token["content"] for token in json.loads(file)["added_tokens"]}
    special = {f"{name}_token": names[given[f"{name}_token_id"]] for name in ("bos", "eos")}
    files = {"tokenizer.json": file, "tokenizer_config.json": json.dumps(special).encode()}
    return LanguageTokenizer(files, "fast")


def load(case: Case) -> Llava:
    weights = open_checkpoint(case.weights)
    shapes = {name: spec.shape for name, spec in weights.specs.items()}
    settings = dict(case.settings["config"])
    settings["text_config"] = case.settings["text"] | {"model_type": "llama"}
    settings["vision_config"] = case.settings["vision"] | {"model_type": "clip_vision_model"}
    found = identify(settings, "hf", shapes)
    model = nnx.eval_shape(lambda: found.architecture.build(found.config, rngs=nnx.Rngs(params=0)))
    leaves = flatten(model)
    read = load_params(
        found.architecture.table(found.layout, found.config, leaves), weights, leaves
    )
    return unflatten(model, read.params)


def compare_gradients(
    case: Case, model: Llava, images: jax.Array, ids: np.ndarray, name: str
) -> None:
    """Logits, attention, and gradients of the log-probability of the likeliest token."""
    arrays, layer = case.arrays, case.settings["attention_layer"]
    length, heads = ids.shape[1], model.config.language.heads
    taps = Taps(attention=(layer,))
    probes = taps.zeros(depth=layer + 1, batch=1, heads=heads, keys=length)

    def score(probes: jax.Array, images: jax.Array) -> tuple:
        out = model(ids, None, images, taps=taps.with_probes(probes))
        last = out.logits[0, -1]
        top = jnp.argmax(last)
        return jax.nn.log_softmax(last)[top], (last, top, out.attention)

    run = jax.jit(jax.value_and_grad(score, argnums=(0, 1), has_aux=True))
    (value, (logits, top, attention)), (by_row, by_pixel) = run(probes, images)
    assert int(top) == arrays[f"top1_{name}"]
    for what, found in {
        "logp_top1": value[None],
        "logits_last": logits[None],
        "attention": attention[0, 0],
        "dlogp_dattention": by_row[0, 0],
        "dlogp_dpixels": by_pixel[0].transpose(0, 3, 1, 2),
    }.items():
        assert_close(found, arrays[f"{what}_{name}"], what=f"{what}_{name}")
    (start,) = image_spans(ids[0], counts=(model.tokens_per_image,))[:, 0]
    last = attention[..., -1:, :]
    grid = tuple(case.settings["grid"])
    maps = image_attention(model, last, np.array([start]))
    stored = arrays[f"attention_{name}"][:, -1, start : start + grid[0] * grid[1]]
    assert_close(maps[0, 0, :, 0], stored.reshape(heads, *grid), what="map over the image")
