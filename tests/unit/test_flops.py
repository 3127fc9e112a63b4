"""FLOPs: model FLOPs against the closed form, with recomputation next to them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from perception_jax.api import Processor
from perception_jax.data.processors import ImageProcessor
from perception_jax.models.clip.config import ClipConfig
from perception_jax.models.clip.modeling import ClipVisionTower
from perception_jax.models.llama.config import LlamaConfig
from perception_jax.models.llama.modeling import Llama
from perception_jax.models.params import flatten, unflatten
from perception_jax.shard import flops
from perception_jax.systems.contrastive.data import ContrastiveData
from perception_jax.systems.contrastive.task import ContrastiveConfig, ContrastiveTask, TowerRemat


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


W, X = shape(8, 8), shape(4, 8)
ONE = 2 * 4 * 8 * 8
"""FLOPs of one product of `X` and `W`."""


def scanned(kernels: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda y, kernel: (jnp.tanh(y @ kernel), None), x, kernels)[0].sum()


def own_rule(w: jax.Array, x: jax.Array) -> jax.Array:
    """A product whose backward pass computes the forward once more."""

    @jax.custom_vjp
    def product(w, x):
        return jnp.tanh(x @ w)

    def backward(kept, gradient):
        w, x = kept
        gradient = gradient * (1 - jnp.tanh(x @ w) ** 2)
        return x.T @ gradient, gradient @ w.T

    product.defvjp(lambda w, x: (product(w, x), (w, x)), backward)
    return product(w, x).sum()


CASES = {
    # The first layer's input has no gradient: twice its forward FLOPs; a further layer three times.
    "first layer": (lambda w, x: (x @ w).sum(), W, 2),
    "two layers": (lambda w, x: (jnp.tanh(x @ w) @ w).sum(), W, 2 + 3),
    "scan": (scanned, shape(10, 8, 8), 10 * 3),  # its first turn as well: one program for all
    "carry from 0": (
        lambda w, x: jax.lax.scan(lambda sum_, row: (sum_ + (row @ w).sum(), None), 0.0, x)[0],
        W,
        2,
    ),
    "recomputed": (jax.checkpoint(lambda w, x: jnp.tanh(x @ w).sum()), W, 2),
    "own rule": (own_rule, W, 2),
    "frozen in front": (lambda w, x: (jnp.tanh(x @ jnp.ones((8, 8))) @ w).sum(), W, 1 + 2),
    "stopped": (lambda w, x: (jax.lax.stop_gradient(x @ w) @ w).sum(), W, 1 + 2),
    "metrics": (lambda w, x: ((x @ w).sum(), {"more": x @ w}), W, 2 + 1),
    "branches": (
        lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w).sum(),
        W,
        2 + 3,
    ),
    "scatter": (lambda w, x: jnp.zeros((9, 8)).at[:4].add(x @ w).sum(), W, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_model_flops_by_hand(case):
    function, kernels, products = CASES[case]
    assert flops.gradient_flops(jax.jit(function), kernels, X) == products * ONE


def test_model_flops_equal_the_counted_gradient_where_nothing_is_recomputed():
    def loss(w, x):
        y = jax.lax.scan(lambda y, _: (jax.nn.relu(y @ w), y), x @ w, length=3)[1]
        return (y.reshape(-1, 8) @ w).sum()

    counted = flops.count_flops(jax.value_and_grad(loss), W, X)
    assert flops.gradient_flops(loss, W, X) == counted


@pytest.mark.parametrize("remat", [False, True])
def test_vit_l14_336_is_within_one_percent_of_the_closed_form(remat):
    config, batch = ClipConfig.vit_l14_336().vision, 2
    tower = nnx.eval_shape(lambda: ClipVisionTower(config, 768, rngs=nnx.Rngs(params=0)))

    def loss(params, pixels):
        return unflatten(tower, params)(pixels, remat=remat).embedding.sum()

    params, pixels = flatten(tower), shape(batch, 336, 336, 3)
    tokens, width = config.tokens, config.width
    layer = 2 * tokens * (4 * width**2 + 2 * width * config.mlp_dim) + 4 * tokens**2 * width
    closed = batch * 3 * config.depth * layer
    needed = flops.gradient_flops(loss, params, pixels)
    assert needed == pytest.approx(closed, rel=0.01)
    if remat:
        computed = flops.count_flops(jax.value_and_grad(loss), params, pixels)
        assert computed / needed > 1.25  # what MFU once took for work


def test_a_clip_step_is_within_one_percent_of_the_closed_form():
    config, batch = ClipConfig.vit_b16(), 8
    task = ContrastiveTask(
        ContrastiveConfig(remat=TowerRemat(vision="full", text="full")),
        config,
        data=ContrastiveData(
            [], Processor(image=ImageProcessor(size=224), tokenizer=None), batch_size=batch, seed=0
        ),
    )
    model = nnx.eval_shape(lambda: task.init(jax.random.key(0)))

    def loss(params, batch):
        return task.loss(unflatten(model, params), batch, jax.random.key(0))[0]

    def tower(tokens, width, depth, mlp_dim):
        layer = 2 * tokens * (4 * width**2 + 2 * width * mlp_dim) + 4 * tokens**2 * width
        return 3 * depth * layer

    vision, text = config.vision, config.text
    # The first layer has no gradient of its input.
    patches = 2 * 2 * 196 * 16 * 16 * 3 * vision.width
    closed = batch * (
        tower(vision.tokens, vision.width, vision.depth, vision.mlp_dim)
        + tower(text.context, text.width, text.depth, text.mlp_dim)
        + patches
    )
    (shapes,) = task.batch_shapes()
    assert flops.gradient_flops(loss, flatten(model), shapes) == pytest.approx(closed, rel=0.01)


def test_a_decoder_step_is_within_one_percent_of_the_closed_form():
    config, batch, tokens = LlamaConfig.vicuna_7b(), 2, 256
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(params=0)))

    def loss(params, ids):
        model_ = unflatten(model, params)
        return jnp.sum(model_(ids).logits.astype(jnp.float32))

    width, heads = config.width, config.width // config.heads
    projections = 2 * width**2 + 2 * width * config.kv_heads * heads
    matrices = config.depth * (projections + 3 * width * config.mlp_dim) + width * config.vocab_size
    # Scores and values of every pair, those that the causal mask hides among them.
    attention = config.depth * 4 * tokens**2 * width
    closed = batch * 3 * (2 * tokens * matrices + attention)
    ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
    assert flops.gradient_flops(loss, flatten(model), ids) == pytest.approx(closed, rel=0.01)


def test_flops_count_each_turn_of_a_scan():
    def stack(kernels: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda y, kernel: (jnp.tanh(y @ kernel), None), x, kernels)[0].sum()

    kernels, x = shape(10, 16, 16), shape(4, 16)
    forward = 10 * 2 * 4 * 16 * 16
    assert flops.count_flops(jax.jit(stack), kernels, x) == forward
    assert flops.count_flops(jax.grad(stack, argnums=(0, 1)), kernels, x) == 3 * forward


def test_flops_of_grouped_convolutions_and_branches():
    def convolve(image: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=4
        )

    def either(flag: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x @ x, x)

    # 8 x 8 places, 8 outputs, each from 3 x 3 places of its group's 2 inputs.
    assert flops.count_flops(convolve, shape(1, 8, 8, 8), shape(3, 3, 2, 8)) == 2 * 64 * 8 * 18
    assert flops.count_flops(either, jnp.bool_(True), shape(4, 4)) == 2 * 2 * 64


def test_peak_flops_knows_kinds_and_no_cpu():
    assert flops.peak_flops("TPU v5 lite") == 197e12
    assert flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert flops.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert flops.peak_flops("NVIDIA L40S") is None
    assert flops.peak_flops("TPU v9 mega") is None
    assert flops.peak_flops(jax.devices()[0].device_kind) is None


def test_a_loop_may_start_from_a_number():
    def loss(weight, rows):
        return jax.lax.scan(lambda sum_, row: (sum_ + jnp.sum(row @ weight), None), 0.0, rows)[0]

    rows, weight = jnp.ones((5, 3, 4)), jnp.ones((4, 2))
    forward = 5 * 2 * 3 * 4 * 2
    assert flops.gradient_flops(loss, weight, rows) == 2 * forward
