"""GiVE against PyTorch: `transformers` runs the backbone, the adapters are written again in torch.

What is compared comes out of `export_merged`: its folder is loaded by `transformers` and by the
reader in the folder's own README, with random weights and with those that ship.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import perception_jax
from perception_jax.api import Loaded, Processor, load_backbone
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.tokenization import ClipTokenizer
from perception_jax.interop.safetensors_io import SafetensorsFile
from perception_jax.models.clip.config import ClipConfig, VisionConfig
from perception_jax.models.clip.modeling import Clip
from perception_jax.models.params import flatten
from perception_jax.models.siglip.config import SiglipConfig, SiglipVisionConfig
from perception_jax.models.siglip.modeling import Siglip
from perception_jax.nn.text_tower import TextConfig
from perception_jax.systems.give.adapter import AdapterConfig
from perception_jax.systems.give.checkpoint import load_give
from perception_jax.systems.give.model import GiveConfig, instruct
from perception_jax.systems.give.pretrained import GiveEncoder, export_merged
from tests.arrays import drawn
from tests.parity.measures import Row
from tests.parity.torch_code import channels_first
from tests.tiny_give import with_adapters

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
F = torch.nn.functional

TEXTS = ("the kite", "a small dog", "the kite")
VISION = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 3, "heads": 4, "mlp_dim": 80}
TEXT = {"vocab_size": 600, "context": 12, "width": 36, "depth": 2, "heads": 3, "mlp_dim": 60}


def tiny_clip() -> Loaded:
    config = ClipConfig(vision=VisionConfig(**VISION), text=TextConfig(**TEXT), embed_dim=20)
    return random_model(lambda: Clip(config, rngs=nnx.Rngs(params=0)), config)


def tiny_siglip() -> Loaded:
    text = TextConfig(**TEXT, pool="last", projection_bias=True, act="gelu_pytorch_tanh", eps=1e-6)
    config = SiglipConfig(vision=SiglipVisionConfig(**VISION), text=text)
    return random_model(lambda: Siglip(config, rngs=nnx.Rngs(params=0)), config)


def random_model(make: Callable[[], nnx.Module], config) -> Loaded:
    tokenizer = ClipTokenizer.shipped(TEXT["vocab_size"], TEXT["context"])
    processor = Processor(image=ImageProcessor(size=VISION["image_size"]), tokenizer=tokenizer)
    return Loaded(model=drawn(make), config=config, processor=processor)


def ids_of(kind: str, encoder: GiveEncoder) -> np.ndarray:
    if kind != "siglip":
        return np.asarray(encoder.processor.texts(TEXTS))
    ids = np.random.default_rng(2).integers(2, TEXT["vocab_size"], (len(TEXTS), TEXT["context"]))
    for row, length in zip(ids, (3, 6, 3), strict=True):  # id 1 ends a text and fills it up
        row[length:] = 1
    return ids.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model with adapters, its exported folder, and what it is shown."""

    kind: str
    encoder: GiveEncoder
    folder: pathlib.Path
    images: list[np.ndarray]
    ids: np.ndarray
    row: Row

    def ours(self, alpha: float | None):
        """The result of the public call; None is without an instruction."""
        told = jax.jit(instruct)(self.encoder.model.backbone.text, jnp.asarray(self.ids))
        options = {} if alpha is None else {"alpha": alpha}
        told = None if alpha is None else told
        return self.encoder.encode(self.images, told, hidden_states=True, **options)

    @property
    def pixels(self):
        """As torch takes them."""
        return channels_first(np.asarray(self.encoder.processor.images(self.images)))

    def assert_equal(self, alpha: float | None, embedding, presence, hidden) -> None:
        """Embeddings and logits within 1e-5; hidden states within 1e-5 of their largest value where
        that is above 1 (trained weights: about 15, where float32 numbers are 1e-6 apart).
        """
        ours = self.ours(alpha)
        self.row.close(ours.embedding, embedding)
        assert (presence is None) == (ours.presence_logit is None) == (alpha is None)
        if presence is not None:
            self.row.close(ours.presence_logit, presence)
        for mine, theirs in zip(ours.hidden_states, hidden, strict=True):
            largest = max(1.0, float(abs(theirs).max()))
            self.row.close(np.asarray(mine) / largest, theirs.detach() / largest)


LARGER = 72
"""Side of the images for `scenes-clip`, whose own positions are for 48."""


@pytest.fixture(scope="module", params=["clip", "siglip", "scenes-clip"])
def setup(request, tmp_path_factory):
    kind, tiny = request.param, {"clip": tiny_clip, "siglip": tiny_siglip}
    loaded = tiny[kind]() if kind in tiny else perception_jax.load(kind)
    give = with_adapters(loaded, GiveConfig(layers=(0, 2), adapter=AdapterConfig(heads=2)))
    backbone = dataclasses.replace(loaded, name=kind)
    encoder = GiveEncoder(give, backbone if kind in tiny else backbone.at_size(LARGER))
    folder = tmp_path_factory.mktemp("merged") / "folder"
    export_merged(folder, encoder)
    images = list(np.random.default_rng(0).integers(0, 256, (len(TEXTS), 50, 40, 3), np.uint8))
    own = SafetensorsFile(folder / "give.safetensors").specs.values()
    row = Row(
        f"GiVE's adapters on {kind if kind == 'scenes-clip' else f'a tiny {kind}'}",
        "ours",
        "transformers, adapters in torch",
        tensors=len(own),
        parameters=sum(math.prod(spec.shape) for spec in own),
    )
    return Setup(kind, encoder, folder, images, ids_of(kind, encoder), row)


def linear(weights, name, x):
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def adapter(weights, name, heads, h, states, mask):
    """The AG-Adapter's addition (specification: cross-attention of image tokens to words)."""
    normed = F.layer_norm(
        h, h.shape[-1:], weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"]
    )
    text = linear(weights, f"{name}.mlp.fc2", F.gelu(linear(weights, f"{name}.mlp.fc1", states)))
    query, key, value = (
        linear(weights, f"{name}.{part}", x).reshape(*x.shape[:2], heads, -1)
        for part, x in (("to_q", normed), ("to_k", text), ("to_v", text))
    )
    scores = torch.einsum("bnhd,bthd->bhnt", query, key) / query.shape[-1] ** 0.5
    shares = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    mixed = torch.einsum("bhnt,bthd->bnhd", shares, value)
    return linear(weights, f"{name}.to_out", mixed.flatten(2))


def steer(block, add):
    """A block of `transformers` that does the same with `add` between its two steps."""

    def forward(hidden_states, attention_mask=None, **options):
        normed = block.layer_norm1(hidden_states)
        attended, _ = block.self_attn(normed, attention_mask=attention_mask, **options)
        h = hidden_states + attended
        h = h + add(h)
        return h + block.mlp(block.layer_norm2(h))

    block.forward = forward


@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 1.0])
def test_a_torch_adapter_in_each_block_gives_the_same(setup, alpha):
    model = transformers.AutoModel.from_pretrained(setup.folder).float()
    weights = safetensors_torch.load_file(setup.folder / "give.safetensors")
    ids = torch.tensor(setup.ids, dtype=torch.long)
    project = getattr(model, "visual_projection", torch.nn.Identity())
    with torch.no_grad():
        text = model.text_model(input_ids=ids)
        told = F.normalize(
            getattr(model, "text_projection", torch.nn.Identity())(text.pooler_output)
        )
        last = [3, 6, 3] if setup.kind == "siglip" else (setup.ids == setup.ids.max()).argmax(1)
        mask = torch.arange(ids.shape[1])[None] <= torch.as_tensor(last)[:, None]

        def add(k, h):
            return alpha * adapter(weights, f"ag_adapters.{k}", 2, h, text.last_hidden_state, mask)

        for k in (0, 2) if alpha is not None else ():
            steer(model.vision_model.encoder.layers[k], functools.partial(add, k))
        out = model.vision_model(pixel_values=setup.pixels, output_hidden_states=True)
        joined = torch.cat([out.pooler_output, told], 1)
        head = linear(weights, "oid_head.fc2", F.gelu(linear(weights, "oid_head.fc1", joined)))
        embedding = F.normalize(project(out.pooler_output))
    presence = None if alpha is None else head[:, 0]
    setup.assert_equal(alpha, embedding, presence, out.hidden_states)


@pytest.fixture(scope="module")
def reader(setup):
    """The code in the folder's README."""
    blocks = re.findall(r"```python\n(.*?)```", (setup.folder / "README.md").read_text(), re.DOTALL)
    code = next(block for block in blocks if "class Give" in block)
    found = {"__name__": "reader"}
    exec(code, found)
    return found["Give"](setup.folder)


@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 1.0])
def test_the_reader_in_the_folders_readme_gives_the_same(setup, reader, alpha):
    ids = None if alpha is None else torch.tensor(setup.ids, dtype=torch.long)
    embedding, presence, out = reader(setup.pixels, ids, alpha or 0.0, output_hidden_states=True)
    setup.assert_equal(alpha, embedding, presence, out.hidden_states)


def test_the_folder_comes_back_bit_for_bit(setup):
    again = load_give(setup.folder / "give.safetensors", load_backbone(setup.folder))
    before, after = flatten(setup.encoder.model), flatten(again)
    assert before.keys() == after.keys()
    if setup.kind == "scenes-clip":  # the folder is for the larger images
        places = "backbone/vision/position_embedding"
        assert len(before.pop(places)) < len(after.pop(places))
    for path in before:
        np.testing.assert_array_equal(before[path], after[path], err_msg=path)
    setup.row.both_ways = True


def test_instructions_are_the_same_tokens_in_transformers(setup):
    if setup.kind == "siglip":
        pytest.skip("made without a tokenizer of its own")
    tokenizer = transformers.AutoTokenizer.from_pretrained(setup.folder)
    theirs = tokenizer(list(TEXTS), padding="max_length", return_tensors="np").input_ids
    np.testing.assert_array_equal(theirs, setup.ids)
