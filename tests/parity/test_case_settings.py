"""Golden checks take every number from the case: with other numbers they pass, and wrong ones fail.

Cases are copies of the shipped ones in which settings are replaced and the arrays recomputed by
numpy in float64: formulas written out, gradients by central differences.
"""

from __future__ import annotations

import json
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from perception_jax.errors import CheckpointError
from tests.parity import test_goldens  # noqa: F401  registers the checks
from tests.parity.cases import Case, find_check

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
STEP = 1e-5


def copy(name: str, tmp_path: pathlib.Path, *, system: str = "give", **settings: Any) -> Case:
    """A case with other settings; they may be those of its parts."""
    folder = tmp_path / system / name
    shutil.copytree(GOLDENS / system / name, folder)
    return changed(Case(folder), **settings)


def changed(case: Case, **settings: Any) -> Case:
    path = case.directory / "case.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return Case(case.directory)


def check_case(case: Case) -> None:
    find_check(case)(case)


def with_arrays(case: Case, arrays: Mapping[str, np.ndarray]) -> Case:
    stored = {k: np.float32(v) if v.dtype == np.float64 else v for k, v in arrays.items()}
    np.savez(case.directory / "io.npz", **stored)
    return Case(case.directory)


def slope(function: Callable[[], float], value: np.ndarray) -> np.ndarray:
    """Gradient with respect to an array that the function reads, by central differences."""
    found = np.zeros(value.shape)
    for place in np.ndindex(value.shape):
        kept, sides = value[place], []
        for move in (STEP, -STEP):
            value[place] = kept + move
            sides.append(function())
        value[place] = kept
        found[place] = (sides[0] - sides[1]) / (2 * STEP)
    return found


# --- Losses -------------------------------------------------------------------------------------


def log_sum(scores: np.ndarray) -> np.ndarray:
    top = scores.max(axis=1, keepdims=True)
    return np.log(np.exp(scores - top).sum(axis=1)) + top[:, 0]


def losses_of(arrays: Mapping[str, np.ndarray], tau: float, weights: Mapping[str, float]) -> dict:
    """Each loss as a function of the arrays as they then are."""
    image, kind = (arrays[name] for name in ("image_id", "class_id"))
    same_kind, same_image = (x[:, None] == x[None] for x in (kind, image))
    positive = same_kind & ~same_image
    count = positive.sum(axis=1)

    def oitc() -> float:
        scores = math.exp(arrays["logit_scale"]) * arrays["v"] @ arrays["t"].T
        scores = np.where(arrays["oitc.ignore"], -np.inf, scores)
        own = np.diagonal(scores)
        return float(np.mean(log_sum(scores) + log_sum(scores.T) - 2 * own) / 2)

    def oiic(absent: bool = True) -> float:
        own = arrays["v"] @ arrays["v"].T / tau
        others = np.where(same_kind & same_image, -np.inf, own)
        if absent:
            others = np.hstack([others, arrays["v"] @ arrays["v_absent"].T / tau])
        terms = np.where(positive, log_sum(others)[:, None] - own, 0.0).sum(axis=1)
        return float(np.mean(terms[count > 0] / count[count > 0]))

    def oid() -> float:
        both = np.log1p(np.exp(-arrays["d"])).mean() + np.log1p(np.exp(arrays["d_absent"])).mean()
        return float(both / 2)

    def total() -> float:
        parts = {"oitc": oitc(), "oiic": oiic(), "oid": oid()}
        return sum(weights[name] * value for name, value in parts.items())

    def oiic_present() -> float:
        return oiic(absent=False)

    return {f.__name__: f for f in (oitc, oiic, oiic_present, oid, total)}


def losses_case(tmp_path: pathlib.Path, tau: float, weights: Mapping[str, float]) -> Case:
    named = {f"w_{name}": value for name, value in weights.items()}
    case = copy("losses", tmp_path, tau=tau, **named)
    arrays = {k: np.float64(v) if v.dtype == np.float32 else v for k, v in case.arrays.items()}
    found = dict(arrays)
    for name, loss in losses_of(arrays, tau, weights).items():
        found[f"{name}.loss"] = np.float64(loss())
        for key in [k for k in arrays if k.startswith(f"{name}.grad_")]:
            found[key] = slope(loss, arrays[key.removeprefix(f"{name}.grad_")])
    return with_arrays(case, found)


def test_losses_of_the_shipped_case_by_numpy(tmp_path):
    """The oracle is right where the authors' numbers are known."""
    check_case(losses_case(tmp_path, 0.07, {"oitc": 1.0, "oiic": 1.0, "oid": 1.0}))


def test_losses_with_another_temperature_and_other_weights(tmp_path):
    case = losses_case(tmp_path, 0.2, {"oitc": 0.5, "oiic": 2.0, "oid": 3.0})
    check_case(case)
    for wrong in ({"tau": 0.07}, {"w_oitc": 1.0}, {"w_oiic": 1.0}, {"w_oid": 1.0}):
        kept = {name: case.settings[name] for name in wrong}
        with pytest.raises(AssertionError, match="deviates"):
            check_case(changed(case, **wrong))
        changed(case, **kept)
    with pytest.raises(AssertionError):
        check_case(changed(case, num_anchors=3))


# --- Adapter ------------------------------------------------------------------------------------

ACTIVATIONS = {
    "gelu_erf": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}


class NumpyAdapter:
    """The AG-Adapter's output and attention from weights under a case's names, float64."""

    def __init__(self, weights: Mapping[str, np.ndarray], settings: Mapping[str, Any]):
        self.weights, self.settings = weights, settings

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def __call__(
        self, h: np.ndarray, states: np.ndarray, mask: np.ndarray, alpha: float
    ) -> tuple[np.ndarray, np.ndarray]:
        centred = h - h.mean(axis=-1, keepdims=True)
        deviation = np.sqrt(
            (centred**2).mean(axis=-1, keepdims=True) + self.settings["layer_norm_eps"]
        )
        normed = centred / deviation * self.weights["norm.weight"] + self.weights["norm.bias"]
        act = ACTIVATIONS[self.settings["mlp_activation"]]
        text = self.linear("mlp.fc2", act(self.linear("mlp.fc1", states)))
        query, key, value = (
            self.linear(name, x).reshape(*x.shape[:2], self.settings["num_heads"], -1)
            for name, x in (("to_q", normed), ("to_k", text), ("to_v", text))
        )
        scores = np.einsum("bnhd,bthd->bhnt", query, key) / math.sqrt(query.shape[-1])
        scores = np.where(mask[:, None, None], scores, -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        mixed = np.einsum("bhnt,bthd->bnhd", shares, value).reshape(h.shape)
        gate = np.tanh(self.weights["gate"]) if "gate" in self.weights else 1.0
        return h + alpha * gate * self.linear("to_out", mixed), shares


def adapter_case(tmp_path: pathlib.Path, **settings: Any) -> Case:
    """The shipped case with other settings, and no gate to keep it small."""
    case = copy("adapter", tmp_path, **settings)
    case = changed(case, subcases={"plain": case.settings["subcases"]["plain"]})
    rng, hidden = np.random.default_rng(0), case.settings["mlp_hidden"]
    text, width = case.settings["text_width"], case.settings["vision_width"]
    files = load_file(case.weights)
    for name, shape in (
        ("fc1.weight", (hidden, text)),
        ("fc1.bias", (hidden,)),
        ("fc2.weight", (width, hidden)),
    ):
        files[f"ag_adapters.0.mlp.{name}"] = np.float32(rng.normal(size=shape) / 4)
    save_file(files, case.weights)
    prefix = "ag_adapters.0."
    weights = {
        name.removeprefix(prefix): np.float64(value)
        for name, value in files.items()
        if name.startswith(prefix)
    }
    adapter, arrays = NumpyAdapter(weights, case.settings), case.arrays
    h, states = (np.float64(arrays[name]) for name in ("h", "text_states"))

    def score() -> float:
        out, _ = adapter(h, states, arrays["mask"], case.settings["alpha"])
        return float(np.sum(out * arrays["cotangent"]))

    found = {name: arrays[name] for name in ("h", "text_states", "mask", "cotangent")}
    found["plain.out"] = adapter(h, states, arrays["mask"], case.settings["alpha"])[0]
    found["plain.out_alpha1"], found["plain.attention"] = adapter(h, states, arrays["mask"], 1.0)
    found["plain.grad_h"] = slope(score, h)
    found["plain.grad_text_states"] = slope(score, states)
    found |= {f"plain.grad.{name}": slope(score, value) for name, value in weights.items()}
    return with_arrays(case, found)


def test_an_adapter_with_other_settings(tmp_path):
    settings = {
        "mlp_hidden": 10,
        "layer_norm_eps": 0.05,
        "num_heads": 2,
        "alpha": 0.3,
        "mlp_activation": "gelu_tanh",
    }
    case = adapter_case(tmp_path, **settings)
    check_case(case)
    for wrong in (
        {"layer_norm_eps": 1e-5},
        {"num_heads": 3},
        {"alpha": 0.6},
        {"mlp_activation": "quick_gelu"},
    ):
        with pytest.raises(AssertionError, match="deviates"):
            check_case(changed(case, **wrong))
        changed(case, **settings)
    with pytest.raises(CheckpointError, match=r"fc1\.weight has shape"):
        check_case(changed(case, mlp_hidden=24))


# --- Evaluation and imports ---------------------------------------------------------------------


def test_ranks_and_strata_of_the_metrics_are_the_cases(tmp_path):
    case = copy("metrics", tmp_path, recall_ks=[1, 5], accuracy_ks=[1])
    with pytest.raises(AssertionError, match=r"lacks \{'acc@5'\}"):
        check_case(case)

    def without(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: without(v) for k, v in value.items() if k not in ("r@10", "acc@5")}

    for part in case.settings["subcases"].values():
        path = case.directory / part["expected"]
        path.write_text(json.dumps(without(json.loads(path.read_text()))))
    check_case(case)
    with pytest.raises(AssertionError):
        check_case(changed(case, overlooked_area_share=0.3))


def test_the_share_of_bad_rows_is_the_cases(tmp_path):
    case = copy("moinst_import", tmp_path, max_bad_share=0.9)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_case(case)


# --- Towers -------------------------------------------------------------------------------------


def test_strengths_layers_and_activations_of_a_tower_are_the_cases(tmp_path):
    """Only the last strength is kept, and features are those of an earlier hidden state."""
    case = copy("tiny_siglip", tmp_path, llava_layer=-3)
    last = f"alpha{len(case.settings['alphas']) - 1}."
    arrays = {name: value for name, value in case.arrays.items() if not name.startswith("alpha")}
    arrays |= {
        f"alpha0.{name.removeprefix(last)}": value
        for name, value in case.arrays.items()
        if name.startswith(last)
    }
    prefix = case.settings["prefix_tokens"]
    for name in ("static", "alpha0"):
        arrays[f"{name}.llava_features"] = arrays[f"{name}.hidden_states"][-3][:, prefix:]
    case = with_arrays(case, arrays)
    case = changed(case, alphas=case.settings["alphas"][-1:])
    check_case(case)
    with pytest.raises(AssertionError, match="presence_logit: deviates"):
        check_case(changed(case, oid_head={"activation": "relu"}))


# --- LLaVA's batches ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("sft_batch", {"model_max_length": 50}),
        ("sft_batch", {"image_aspect_ratio": "square"}),
        ("sft_batch", {"image_size": 48}),
        ("sft_batch", {"template": "llava_v1"}),
        ("modality_sampler", {"batch_size": 2}),
        ("modality_sampler", {"world_size": 4}),
    ],
)
def test_batches_of_llava_depend_on_the_settings(tmp_path, name, wrong):
    case = copy(name, tmp_path, system="mmvp_mof")
    check_case(case)
    with pytest.raises((AssertionError, KeyError)):
        check_case(changed(case, **wrong))
