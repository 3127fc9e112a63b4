"""LLaVA: places of images in texts, mixing, projectors, maps over images, and what is refused."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perception_jax.data.conversation import IMAGE as DATA_IMAGE
from perception_jax.data.conversation import image_spans
from perception_jax.errors import ConfigError
from perception_jax.generate import IMAGE, Generator, LanguageModel, decode, prefill
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.hosts import Host, image_attention
from perception_jax.models.llava import Llava, LlavaConfig
from perception_jax.models.llava.modeling import Projector
from perception_jax.models.params import flatten
from perception_jax.models.siglip.config import SiglipVisionConfig
from perception_jax.models.towers import TowerConfig
from perception_jax.nn import stack
from perception_jax.nn.taps import Taps
from perception_jax.ops.image import CLIP_MEAN, CLIP_STD, normalise
from perception_jax.testing import tiny_llava
from tests.arrays import drawn

CONFIGS = {"clip": tiny_llava.CONFIG, "imof": tiny_llava.IMOF, "amof": tiny_llava.AMOF}
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(3, 2, 24, 24, 3)).astype(np.float32)


@functools.cache
def made(name: str) -> Llava:
    return drawn(lambda: Llava(CONFIGS[name], rngs=nnx.Rngs(params=0)))


def row(tokens: int, *parts: int, length: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Texts of so many tokens with an image between each two of them, padded on the right."""
    ids: list[int] = []
    for k, count in enumerate(parts):
        ids += [IMAGE] * tokens if k else []
        ids += RNG.integers(3, 90, count).tolist()
    mask = np.arange(length) < len(ids)
    return np.pad(np.array(ids, np.int32), (0, length - len(ids))), mask


def batch(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """One image; a text alone, not at the end; two images."""
    rows = [row(tokens, 3, 5), row(tokens, 7), row(tokens, 2, 1, 4)]
    return np.stack([ids for ids, _ in rows]), np.stack([mask for _, mask in rows])


@jax.jit
def tokens_of(model, ids, mask, images):
    return model(ids, mask, images, head=False).tokens


def test_the_id_of_images_is_that_of_the_data():
    assert IMAGE == DATA_IMAGE
    assert isinstance(made("clip"), Host)
    assert isinstance(made("clip"), LanguageModel)


@pytest.mark.parametrize("name", CONFIGS)
def test_images_take_their_places_in_order(name):
    """Against rows put together by hand."""
    model, tokens = made(name), CONFIGS[name].tokens_per_image
    assert tokens == (18 if name == "imof" else 9)
    ids, _ = batch(tokens)
    found = np.asarray(jax.jit(lambda m, i, x: m.embed(i, m.image_tokens(x)))(model, ids, IMAGES))
    pictures = np.asarray(jax.jit(lambda m, x: m.image_tokens(x))(model, IMAGES))
    table = np.asarray(model.language.token_embedding[...])
    for k, used in enumerate((1, 0, 2)):
        wanted = [table[max(number, 0)] for number in ids[k]]
        places = np.flatnonzero(ids[k] == IMAGE)
        assert len(places) == used * tokens
        for place, vector in zip(places, pictures[k, :used].reshape(-1, 32), strict=True):
            wanted[place] = vector
        np.testing.assert_array_equal(found[k], np.stack(wanted))


def test_interleaving_and_adding_by_hand():
    imof, amof = made("imof"), made("amof")
    clip, dino = jax.jit(lambda m, x: m.image_features(x))(imof, IMAGES)
    assert (clip.shape, dino.shape) == ((3, 2, 9, 24), (3, 2, 9, 64))
    first, second = imof.projector(clip), imof.second_projector(dino)
    found = np.asarray(imof.project((clip, dino)))
    np.testing.assert_allclose(found[:, :, 0::2], first, atol=1e-6)
    np.testing.assert_allclose(found[:, :, 1::2], second, atol=1e-6)
    clip, dino = jax.jit(lambda m, x: m.image_features(x))(amof, IMAGES)
    found = np.asarray(amof.project((clip, dino)))
    np.testing.assert_allclose(found, amof.projector(0.25 * clip + 0.75 * dino), atol=1e-6)


def test_features_are_hidden_states_without_norm_or_class_token():
    """CLIP's behind its last block but one, DINOv2's behind its last."""
    model, pixels = made("imof"), IMAGES[:, 0]
    clip, dino = jax.jit(lambda m, x: m.image_features(x))(model, IMAGES)
    taps = Taps(hidden=(-1, -2))
    states = jax.jit(lambda m, x: [t(x, taps=taps).hidden for t in (m.vision, m.second_vision)])
    theirs, others = states(model, pixels)
    np.testing.assert_allclose(clip[:, 0], theirs[0][:, 1:], atol=1e-5)
    np.testing.assert_allclose(dino[:, 0], others[1][:, 1:], atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "imof"])
def test_padding_batch_mates_and_unused_images_change_nothing(name):
    model, tokens = made(name), CONFIGS[name].tokens_per_image
    ids, mask = batch(tokens)
    together = np.asarray(tokens_of(model, ids, mask, IMAGES))
    noise = IMAGES.copy()
    noise[0, 1], noise[1] = 7.0, -3.0  # the second of the first row, both of the text alone
    np.testing.assert_array_equal(tokens_of(model, ids, mask, noise), together)
    for k in range(3):
        count = mask[k].sum()
        left = np.roll(ids[k], len(mask[k]) - count)[None], np.sort(mask[k])[None]
        alone = np.asarray(tokens_of(model, *left, IMAGES[k : k + 1]))[0, -count:]
        np.testing.assert_allclose(alone, together[k, :count], atol=2e-5)


def test_uint8_images_are_normalised_as_the_first_tower_expects():
    pixels = RNG.integers(0, 256, (2, 1, 24, 24, 3), np.uint8)
    run = jax.jit(lambda m, x: m.image_tokens(x))
    floats = normalise(jnp.asarray(pixels), CLIP_MEAN, CLIP_STD)
    np.testing.assert_allclose(run(made("imof"), pixels), run(made("imof"), floats), atol=1e-6)


def test_a_gradient_reaches_the_pixels():
    """ViCrop's third method; what does not train is the task's to say."""
    model = made("imof")
    ids, mask = batch(CONFIGS["imof"].tokens_per_image)

    def score(images):
        return model(ids, mask, images, head=False).tokens[:, -1].sum()

    found = np.abs(np.asarray(jax.jit(jax.grad(score))(IMAGES))).max(axis=(2, 3, 4))
    assert (found[[0, 2, 2], [0, 0, 1]] > 0).all()
    assert (found[[0, 1, 1], [1, 0, 1]] == 0).all()


# --- Generation and maps --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_over_an_image_in_prefill_and_decode(name):
    model, tokens = made(name), CONFIGS[name].tokens_per_image
    ids, mask = batch(tokens)
    counts = mask.sum(axis=1)
    starts = np.array([(ids[k] == IMAGE).argmax() for k in range(3)])
    assert image_spans(ids[2], counts=(tokens, tokens))[0, 0] == starts[2]
    rows = Taps(attention=(1,), rows=jnp.asarray(counts - 1)[:, None])

    @jax.jit
    def run(model):
        images = model.image_tokens(IMAGES)
        first = prefill(model, ids, mask, image_tokens=images, capacity=64, taps=rows)
        more = decode(model, first.state, steps=3, taps=Taps(attention=(1,)))
        whole = model(ids, mask, IMAGES, taps=Taps(attention=(1,))).attention
        return first.attention, more, whole

    found, more, whole = run(model)
    maps = np.asarray(image_attention(model, found, starts))
    assert maps.shape == (1, 3, 4, 1, 3, 3)
    for k in (0, 2):
        own = np.asarray(whole)[0, k, :, counts[k] - 1, starts[k] : starts[k] + tokens]
        own = own.reshape(4, 9, -1).sum(axis=-1).reshape(4, 3, 3)
        np.testing.assert_allclose(maps[0, k, :, 0], own, atol=1e-5)
    # The second new token reads the image through the cache, as in a run with both.
    chosen = np.asarray(more.ids)
    longer, longer_mask = np.pad(ids, ((0, 0), (0, 2))), np.pad(mask, ((0, 0), (0, 2)))
    for k in range(3):
        longer[k, counts[k] : counts[k] + 2] = chosen[k, :2]
        longer_mask[k, counts[k] : counts[k] + 2] = True
    taps = Taps(attention=(1,), rows=jnp.asarray(counts + 1)[:, None])
    again = jax.jit(lambda m: m(longer, longer_mask, IMAGES, taps=taps, head=False).attention)
    later = image_attention(model, more.attention[1], starts)
    np.testing.assert_allclose(later, image_attention(model, again(model), starts), atol=1e-5)


def test_a_generator_takes_images_now_and_later():
    model, tokens = made("imof"), CONFIGS["imof"].tokens_per_image
    ids, mask = batch(tokens)
    prompts = [one[own] for one, own in zip(ids, mask, strict=True)]
    pictures = jax.jit(lambda m, x: m.image_tokens(x))(model, IMAGES)
    generator = Generator(model, chunk=4)
    together = generator.generate(prompts, image_tokens=pictures, tokens=6)
    for k in (0, 2):
        alone = generator.generate([prompts[k]], image_tokens=pictures[k : k + 1], tokens=6)
        assert alone[0].ids == together[k].ids
    # The second image of the last row comes with a later turn.
    cut = image_spans(prompts[2], counts=(tokens, tokens))[1, 0]
    first = generator.prefill([prompts[2][:cut]], image_tokens=pictures[2:, :1]).state
    both = generator.extend(first, [prompts[2][cut:]], image_tokens=pictures[2:, 1:]).state
    whole = generator.prefill([prompts[2]], image_tokens=pictures[2:]).state
    np.testing.assert_allclose(both.logits, whole.logits, atol=1e-4)
    texts = prompts[2][prompts[2] != IMAGE]
    assert set(np.flatnonzero(whole.seen[0])) == set(texts)
    np.testing.assert_array_equal(both.seen, whole.seen)
    separate = Generator(stack.separate(model, keep=True), chunk=4)
    assert separate.generate(prompts, image_tokens=pictures, tokens=6)[2].ids == together[2].ids
    with pytest.raises(ConfigError, match=r"expected 18 places \(id -200\).*found 17 in row 0"):
        generator.prefill([prompts[0][: 3 + 17]], image_tokens=pictures[:1])
    with pytest.raises(ConfigError, match="at most 1 images of a row, found 36"):
        generator.prefill([prompts[2]], image_tokens=pictures[2:, :1])
    with pytest.raises(ConfigError, match="found -200"):
        generator.prefill([prompts[0]])


def test_images_beside_embeddings_are_refused():
    with pytest.raises(ConfigError, match="found embeddings"):
        made("clip")(jnp.zeros((3, 4, 32)), None, IMAGES)


def test_places_without_an_image_are_nan_in_compiled_functions():
    model = made("clip")
    ids = np.array([[5, *[IMAGE] * 18, 6]], np.int32)
    tokens = jnp.ones((1, 1, 9, 32))
    found = np.asarray(jax.jit(lambda m, i: m.embed(i, tokens))(model, ids))[0]
    assert np.isnan(found[10:19]).all()
    assert np.isfinite(found[[*range(10), 19]]).all()


# --- Configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("projector", "leaves"), [("linear", 2), ("mlp2x_gelu", 4), ("mlp3x_gelu", 6), ("identity", 0)]
)
def test_projectors(projector, leaves):
    width = 24 if projector == "identity" else 32
    language = dataclasses.replace(tiny_llava.CONFIG.language, width=width)
    config = dataclasses.replace(tiny_llava.CONFIG, language=language, projector=projector)
    model = drawn(lambda: Llava(config, rngs=nnx.Rngs(params=0)))
    own = {path: x for path, x in flatten(model).items() if path.startswith("projector/")}
    assert len(own) == leaves
    x = RNG.normal(size=(1, 2, 9, 24)).astype(np.float32)
    wanted = x
    for k in range(leaves // 2):
        gelu = np.asarray(jax.nn.gelu(wanted, approximate=False)) if k else wanted
        layer = f"projector/fc{k + 1}"
        wanted = gelu @ np.asarray(own[f"{layer}/kernel"]) + np.asarray(own[f"{layer}/bias"])
    np.testing.assert_allclose(model.project((x,)), wanted, atol=1e-5)
    with pytest.raises(ConfigError, match="features of 1 image tower"):
        model.project((x, x))


def test_new_projectors_start_as_in_pytorch():
    leaves = flatten(jax.jit(lambda: Projector(2, 16, 64, rngs=nnx.Rngs(params=0)))())
    for name, inputs in (("fc1", 16), ("fc2", 64)):
        for leaf in ("kernel", "bias"):
            values = np.abs(np.asarray(leaves[f"{name}/{leaf}"])) * inputs**0.5
            assert 0.8 < values.max() <= 1
            assert 0.35 < values.mean() < 0.65


def test_any_two_towers_of_one_grid_are_mixed():
    siglip = TowerConfig(
        vision=SiglipVisionConfig(
            image_size=24, patch_size=8, width=16, depth=2, heads=2, mlp_dim=32
        )
    )
    config = dataclasses.replace(tiny_llava.IMOF, towers=(siglip, tiny_llava.DINOV2))
    model = drawn(lambda: Llava(config, rngs=nnx.Rngs(params=0)))
    pixels = RNG.integers(0, 256, (1, 1, 24, 24, 3), np.uint8)
    found = jax.jit(lambda m, x: m.image_tokens(x))(model, pixels)
    assert found.shape == (1, 1, 18, 32)
    half = normalise(jnp.asarray(pixels), (0.5,) * 3, (0.5,) * 3)  # SigLIP's
    wanted = jax.jit(lambda m, x: m.image_tokens(x))(model, half)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def with_patch(size: int) -> Dinov2Config:
    return dataclasses.replace(tiny_llava.DINOV2, patch_size=size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"towers": (tiny_llava.CLIP, with_patch(6)), "mixing": "interleaved"},
            r"equal grids alone; at 24 pixels they are 3×3 \(patches of 8 pixels\) and 4×4",
        ),
        ({"towers": (tiny_llava.CLIP, tiny_llava.DINOV2)}, r"'single' takes 1 image tower"),
        ({"mixing": "additive"}, r"'additive' takes 2 image tower"),
        (
            {"towers": (tiny_llava.CLIP, tiny_llava.DINOV2), "mixing": "additive"},
            r"features of one width can be added, found \[24, 64\]",
        ),
        ({"projector": "identity"}, "need the width of the language model, 32"),
        ({"projector": "mlp2x_relu"}, "expected 'linear', 'identity' or a name such as"),
        ({"select_layer": -5}, r"has 3 blocks, found the hidden state -5"),
        ({"towers": ("clip",)}, "expected a TowerConfig or a Dinov2Config, found str"),
        (
            {"towers": (dataclasses.replace(tiny_llava.CLIP, embed_dim=8),)},
            "without a projection to a joint space",
        ),
        (
            {
                "towers": (tiny_llava.CLIP, dataclasses.replace(tiny_llava.DINOV2, registers=4)),
                "mixing": "interleaved",
                "select_feature": "cls_patch",
            },
            r"tokens before the patches, found \[1, 5\]",
        ),
    ],
)
def test_what_cannot_be_built_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(tiny_llava.CONFIG, **changes)


def test_all_features_of_both_towers():
    config = dataclasses.replace(tiny_llava.IMOF, select_feature="cls_patch", select_layer=3)
    model = drawn(lambda: Llava(config, rngs=nnx.Rngs(params=0)))
    assert (config.tokens_per_image, config.layers) == (20, (3, 2))
    found = jax.jit(lambda m, x: m.image_tokens(x))(model, IMAGES[:1])
    assert found.shape == (1, 2, 20, 32)
    rows = np.arange(20.0, dtype=np.float32)
    wanted = (rows[0::2] + rows[1::2])[1:].reshape(3, 3)
    np.testing.assert_array_equal(model.image_map(jnp.asarray(rows)), wanted)


def test_sizes_of_published_models():
    imof = LlavaConfig.imof_13b()
    assert (imof.tokens_per_image, LlavaConfig.imof_13b(224).tokens_per_image) == (1152, 512)
    assert LlavaConfig.llava15_7b().tokens_per_image == 576
    assert imof.layers == (23, 24)
    copy = LlavaConfig.llava15_7b().with_image_token()
    assert (copy.image_id, copy.language.pad_id, copy.language.vocab_size) == (32000, 32001, 32064)
    with pytest.raises(ConfigError, match="224 or 336 pixels, found 448"):
        LlavaConfig.llava_7b(448)
