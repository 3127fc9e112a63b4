"""LoRA both ways against PEFT, on a random tiny CLIP of `transformers`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import perception_jax
from perception_jax.api import load_lora, save_lora
from perception_jax.models.params import flatten
from perception_jax.nn.adapters import AdapterParam
from perception_jax.nn.lora import merge_lora
from perception_jax.ops.next_token import next_token_loss
from tests.arrays import run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT asks for it
)
TARGETS = {
    "by their ends": ["q_proj", "fc1"],
    "one tower": r"vision_model\..*\.(v_proj|out_proj|fc2)",
    "projections": ["visual_projection", "k_proj"],
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A model of `transformers` and the folder it was saved to."""
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    vision = {**tower, "num_hidden_layers": 3, "image_size": 16, "patch_size": 8}
    text = {**tower, "num_hidden_layers": 2, "vocab_size": 90, "max_position_embeddings": 12}
    text |= {"bos_token_id": 88, "eos_token_id": 89, "pad_token_id": 89}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPModel(config).eval().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_lora_both_ways(clip, tmp_path, targets, rank_stabilized):
    config = peft.LoraConfig(
        r=5,
        lora_alpha=7,
        target_modules=TARGETS[targets],
        use_rslora=rank_stabilized,
        lora_dropout=0.1,
    )
    theirs = peft.get_peft_model(transformers.CLIPModel.from_pretrained(clip), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:  # zero at first
                parameter.copy_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    pixels, ids = inputs()
    with torch.no_grad():
        expected = theirs(
            pixel_values=torch.from_numpy(np.moveaxis(pixels, -1, 1).copy()),
            input_ids=torch.from_numpy(ids.astype(np.int64)),
        ).logits_per_image.numpy()

    base = perception_jax.load(clip)
    ours = load_lora(base, tmp_path / "theirs")
    plain = run(base.model, jnp.asarray(pixels), jnp.asarray(ids)).logits_per_image
    assert np.abs(plain - expected).max() > 1e-2
    for model in (ours.model, merge_lora(ours.model)):
        found = run(model, jnp.asarray(pixels), jnp.asarray(ids)).logits_per_image
        np.testing.assert_allclose(found, expected, atol=2e-5)

    save_lora(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(
        transformers.CLIPModel.from_pretrained(clip), tmp_path / "ours"
    ).eval()
    before, after = (peft.get_peft_model_state_dict(model) for model in (theirs, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        found = again(
            pixel_values=torch.from_numpy(np.moveaxis(pixels, -1, 1).copy()),
            input_ids=torch.from_numpy(ids.astype(np.int64)),
        ).logits_per_image.numpy()
    np.testing.assert_array_equal(found, expected)
    assert len(flatten(ours.model)) - len(flatten(base.model)) > 0


def test_a_torch_file_is_read(clip, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    theirs = peft.get_peft_model(transformers.CLIPModel.from_pretrained(clip), config)
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    found = flatten(load_lora(perception_jax.load(clip), tmp_path).model)
    name = "base_model.model.vision_model.encoder.layers.1.self_attn.q_proj.lora_A.weight"
    expected = peft.get_peft_model_state_dict(theirs)[name].numpy().T
    np.testing.assert_array_equal(found["vision/blocks/attention/q_proj/lora/a"][1], expected)


def test_a_language_model_trains_as_with_peft(tmp_path):
    """Loss and gradients of the matrices, those of the head among them."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj", "lm_head"])
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(base, settings).train()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 61, (2, 14))
    labels = np.where(rng.random(ids.shape) < 0.4, -100, ids)
    loss = theirs(torch.tensor(ids), labels=torch.tensor(labels)).loss
    loss.backward()

    ours = load_lora(perception_jax.load(tmp_path / "base"), tmp_path / "lora")
    graph, lora, frozen = nnx.split(ours.model, AdapterParam, ...)

    def objective(lora):
        model = nnx.merge(graph, lora, frozen)
        hidden = model(jnp.asarray(ids), head=False).tokens
        return next_token_loss(hidden, model.logits, jnp.asarray(labels), chunk=5).mean()

    value, gradient = jax.jit(jax.value_and_grad(objective))(lora)
    np.testing.assert_allclose(value, loss.item(), atol=1e-5)
    found = {"/".join(map(str, k)): v.get_value() for k, v in nnx.to_flat_state(gradient)}
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:
            continue
        module, part = name.replace(".default", "").rsplit(".lora_", 1)
        module = module.removeprefix("base_model.model.")
        leaf = "lm_head" if module == "lm_head" else ENDS[module.rsplit(".", 1)[-1]]
        ours_of = found.pop(f"{leaf}/lora/{part[0].lower()}", None)
        if ours_of is None:  # another layer of a stack that was compared before
            continue
        if leaf == "lm_head":
            np.testing.assert_allclose(ours_of, parameter.grad.numpy().T, atol=1e-5)
            continue
        for k, layer in enumerate(ours_of):
            other = theirs.get_parameter(name.replace(".layers.0.", f".layers.{k}."))
            np.testing.assert_allclose(layer, other.grad.numpy().T, atol=1e-5)
    assert not found


ENDS = {"q_proj": "blocks/attention/q_proj", "down_proj": "blocks/mlp/down"}
"""Paths of layers by the last part of their names."""


def inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 88, (3, 12)).astype(np.int32)
    ids[:, 0], ids[0, 5:], ids[1, 11], ids[2, 8:] = 88, 89, 89, 89
    return rng.normal(size=(2, 16, 16, 3)).astype(np.float32), ids
