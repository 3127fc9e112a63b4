"""Golden checks of GiVE's losses and adapter, gradients included."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from perception_jax.interop.export import export_params
from perception_jax.interop.load import load_params
from perception_jax.interop.rules import RuleTable
from perception_jax.models.params import flatten, unflatten
from perception_jax.systems.give import losses
from perception_jax.systems.give.adapter import AdapterConfig, AgAdapter, InstructionFeatures
from perception_jax.systems.give.checkpoint import adapter_rules
from tests.parity.cases import Case, assert_close, check

ROWS = {"present": "v", "text": "t", "absent": "v_absent"}
LOGITS = {"present_logit": "d", "absent_logit": "d_absent"}


@check("give", when=lambda case: case.name.startswith("losses"))
def loss_values_and_gradients(case: Case) -> None:
    settings, arrays = case.settings, case.arrays
    given = {name: jnp.asarray(arrays[key]) for name, key in {**ROWS, **LOGITS}.items()}
    rows, scale = _rows(arrays), jnp.exp(arrays["logit_scale"])
    np.testing.assert_array_equal(losses.same_meaning(rows), arrays["oitc.ignore"])
    positives = np.asarray(losses.positive_pairs(rows)).sum(axis=1)
    np.testing.assert_array_equal(positives, arrays["oiic.num_positives"])
    assert np.count_nonzero(positives) == settings["num_anchors"]
    for name, parts, absent_rows in (
        ("oitc", ("v", "t"), True),
        ("oiic", ("v", "v_absent"), True),
        ("oiic_present", ("v",), False),
        ("oid", ("d", "d_absent"), True),
        ("total", ("v", "t", "v_absent", "d", "d_absent"), True),
    ):
        weights = {key: float(settings[f"w_{key}"]) for key in ("oitc", "oiic", "oid")}
        config = losses.LossConfig(
            **weights, absent_rows=absent_rows, oiic_temperature=float(settings["tau"])
        )
        part = name.removesuffix("_present")
        loss, gradients = jax.jit(
            jax.value_and_grad(
                lambda given, config=config, part=part: getattr(
                    losses.all_losses(config, rows, scale=scale, **given), part
                )
            )
        )(given)
        assert_close(loss, arrays[f"{name}.loss"], what=name)
        for ours, theirs in {**ROWS, **LOGITS}.items():
            if theirs in parts:
                assert_close(
                    gradients[ours], arrays[f"{name}.grad_{theirs}"], what=f"{name} {ours}"
                )
    lonely = {**arrays, "class_id": arrays["no_anchor.class_id"]}
    at = functools.partial(losses.oiic, temperature=float(settings["tau"]))
    loss, gradient = jax.jit(jax.value_and_grad(at))(
        given["present"], _rows(lonely), given["absent"]
    )
    assert (float(loss), float(jnp.abs(gradient).max())) == (arrays["no_anchor.oiic_loss"], 0.0)


def _rows(arrays: Mapping[str, np.ndarray]) -> losses.RowLabels:
    names = {"image": "image_id", "label": "class_id", "caption": "caption_id"}
    return losses.RowLabels(
        **{ours: jnp.asarray(arrays[key], jnp.int32) for ours, key in names.items()}
    )


@check("give", when=lambda case: case.name.startswith("adapter"))
def adapter_output_attention_and_gradients(case: Case) -> None:
    for name, part in case.settings["subcases"].items():
        _adapter(case, name, part)


ACTIVATIONS = {"gelu_erf": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""Ours by the names that cases use for others than Hugging Face's."""


def adapter_config(settings: Mapping[str, Any]) -> AdapterConfig:
    """The settings of a case's adapters."""
    act = settings["mlp_activation"]
    return AdapterConfig(
        heads=settings["num_heads"],
        gate=settings["gate"] or "none",
        mlp_hidden=settings["mlp_hidden"],
        act=ACTIVATIONS.get(act, act),
        eps=settings["layer_norm_eps"],
    )


def _adapter(case: Case, name: str, part: Mapping[str, Any]) -> None:
    settings, arrays = case.settings, case.arrays
    config = adapter_config({**settings, **part})
    widths = settings["vision_width"], settings["text_width"]
    fresh = nnx.eval_shape(lambda: AgAdapter(config, *widths, rngs=nnx.Rngs(params=0)))
    prefix = f"ag_adapters.{part['block']}"
    table = RuleTable(rules=adapter_rules(prefix, "adapter", config))
    files = load_file(case.weights)
    files = {key: value for key, value in files.items() if key.startswith(f"{prefix}.")}
    abstract = {
        f"adapter/{path}": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in flatten(fresh).items()
    }
    params = load_params(table, files, abstract).params
    adapter = unflatten(fresh, {path[8:]: leaf for path, leaf in params.items()})
    h = jnp.asarray(arrays["h"])

    def steer(strength: float) -> InstructionFeatures:
        return InstructionFeatures(
            states=jnp.asarray(arrays["text_states"]),
            mask=jnp.asarray(arrays["mask"]),
            embedding=jnp.zeros((len(h), 1)),
            strength=jnp.float32(strength),
        )

    def score(
        adapter: AgAdapter, h: jax.Array, states: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        given = dataclasses.replace(steer(settings["alpha"]), states=states)
        out = adapter(h, given)
        found = {
            "out": out,
            "out_alpha1": adapter(h, steer(1.0)),
            "attention": adapter.attention(h, steer(1.0)),
        }
        return jnp.sum(out * arrays["cotangent"]), found

    gradients, found = jax.jit(jax.grad(score, argnums=(0, 1, 2), has_aux=True))(
        adapter, h, steer(1.0).states
    )
    for key in ("out", "out_alpha1", "attention"):
        assert_close(found[key], arrays[f"{name}.{key}"], what=f"{name} {key}")
    of_adapter, of_h, of_states = gradients
    assert_close(of_h, arrays[f"{name}.grad_h"], what=f"{name} gradient of h")
    assert_close(of_states, arrays[f"{name}.grad_text_states"], what=f"{name} gradient of states")
    leaves = {f"adapter/{path}": leaf for path, leaf in flatten(of_adapter).items()}
    for tensor in export_params(table, leaves):
        expected = arrays[f"{name}.grad{tensor.name.removeprefix(prefix)}"]
        assert_close(tensor.read(), expected, what=f"{name} gradient of {tensor.name}")
