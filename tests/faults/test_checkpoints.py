"""The parts of a checkpoint: frozen leaves by reference, checksums, older layouts, copies."""

from __future__ import annotations

import json
import math
import os
import pathlib
import shutil
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from perception_jax.errors import CheckpointError
from perception_jax.models.llama import Llama, LlamaConfig
from perception_jax.models.params import flatten
from perception_jax.nn import LoraConfig, add_lora
from perception_jax.nn.adapters import AdapterParam
from perception_jax.shard.mesh import make_mesh
from perception_jax.train import checkpoint, frozen, integrity, loop, restore
from perception_jax.train.config import TrainConfig
from perception_jax.train.metrics import read_metrics
from tests.tiny_training import TinyTask, read_arrays

SIZE = 512


class Wide(TinyTask):
    """Beside a few trained leaves it has 1 MiB that does not train, drawn with `seed`."""

    seed: int = 0

    def init(self, key: jax.Array) -> nnx.Module:
        model = super().init(key)
        model.table = nnx.BatchStat(jnp.zeros((SIZE, SIZE)))
        return model

    def pretrained(self, targets: Any) -> dict[str, Any]:
        table = np.random.default_rng(self.seed).normal(size=(SIZE, SIZE)).astype(np.float32)
        return {"table": table}


def train(workdir: pathlib.Path, task: Any = None, devices: int = 1, **settings: Any) -> Any:
    stop = settings.pop("stop", None)
    defaults = {"steps": 6, "batch_size": 16, "log_every": 1, "checkpoint_every": 2, "keep": 9}
    config = TrainConfig.from_mapping({**defaults, **settings})
    return loop.run(task or Wide(), config, workdir, stop=stop, devices=jax.devices()[:devices])


def curve(workdir: pathlib.Path) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "grad_norm", "param_norm")
    return [tuple(line.get(key) for key in keys) for line in read_metrics(workdir)]


def folder_bytes(path: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def frozen_part(workdir: pathlib.Path) -> pathlib.Path:
    (part,) = (workdir / "frozen").iterdir()
    return part


def largest(path: pathlib.Path) -> pathlib.Path:
    return max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(file: pathlib.Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_frozen_leaves_are_written_once(tmp_path):
    train(tmp_path, stop=lambda step: step == 3)
    part = frozen_part(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in part.rglob("*")}
    model = train(tmp_path).model
    assert {file: file.stat().st_mtime_ns for file in part.rglob("*")} == before
    assert frozen_part(tmp_path) == part
    assert folder_bytes(part) > 0.9 * 4 * SIZE**2  # random numbers do not compress
    for step in (2, 4, 6):
        saved = tmp_path / "checkpoints" / str(step)
        assert checkpoint.read_meta(saved)["frozen"] == part.name
        assert folder_bytes(saved) < 0.05 * 4 * SIZE**2
    loaded, _ = restore.load_model(Wide(), tmp_path, mesh=make_mesh())
    for path, leaf in flatten(model).items():
        np.testing.assert_array_equal(flatten(loaded)[path], leaf, err_msg=path)


@pytest.mark.parametrize("multiplier", [None, 0.0])
def test_leaves_that_rules_freeze_are_written_once(tmp_path, multiplier):
    """As those that the task does not train: by reference, without a gradient or an average."""
    rules = [("^text/", multiplier), (".*",)]
    optim = {"rules": rules, "ema": 0.9, "learning_rate": 0.01}
    train(tmp_path, TinyTask(), stop=lambda step: step == 3, optim=optim)
    model = train(tmp_path, TinyTask(), devices=4, optim=optim).model
    saved = tmp_path / "checkpoints" / "6"
    arrays = read_arrays(saved, "state")
    trained = {"image/kernel", "image/bias", "logit_scale", "logit_bias"}
    assert set(arrays["trainable"]) == set(arrays["ema"]) == trained
    assert not [path for path in arrays["opt_state"] if "text" in path]
    kept = read_arrays(frozen_part(tmp_path), "leaves")
    assert set(kept) == {"whiten", "text/kernel", "text/bias"}
    first = flatten(train(tmp_path / "other", TinyTask(), steps=1).model)
    assert not np.array_equal(first["text/kernel"], kept["text/kernel"])  # it would train
    loaded, step = restore.load_model(TinyTask(), tmp_path)
    assert step == 6
    for path, leaf in flatten(model).items():
        np.testing.assert_array_equal(flatten(loaded)[path], leaf, err_msg=path)


def test_a_lora_checkpoint_is_below_a_hundredth_of_its_model():
    """Rank 8 on the queries and values of Vicuna 7B: float32 with two moments, by the model in
    bfloat16; and a checkpoint has only what `TrainState` calls trained."""
    model = nnx.eval_shape(
        lambda: add_lora(
            Llama(LlamaConfig.vicuna_7b(), rngs=nnx.Rngs(0)),
            LoraConfig(rank=8, alpha=16.0),
            (".*/attention/[qv]_proj",),
            rngs=nnx.Rngs(1),
        )
    )
    _, trained, constant = nnx.split(model, AdapterParam, ...)
    moments = jax.eval_shape(optax.adamw(1e-3).init, nnx.to_pure_dict(trained))
    size = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves((trained, moments)))
    whole = sum(2 * math.prod(leaf.shape) for leaf in jax.tree.leaves(constant))
    assert 30e6 < size < 60e6 < 13e9 < whole
    assert size < 0.01 * whole


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_the_frozen_part_is_rewritten_from_pretrained_leaves(tmp_path, caplog, how):
    train(tmp_path / "whole")
    train(tmp_path / "hurt", stop=lambda step: step == 3)
    part = frozen_part(tmp_path / "hurt")
    shutil.rmtree(part) if how == "missing" else flip(largest(part))
    with pytest.raises(CheckpointError) as caught:
        restore.load_model(Wide(), tmp_path / "hurt")
    assert f"Copy the folder frozen/{part.name}" in str(caught.value)
    other = Wide()
    other.seed = 1
    with pytest.raises(CheckpointError, match=f"frozen leaves with the digest {part.name}.* new"):
        train(tmp_path / "hurt", other)
    assert checkpoint.steps(tmp_path / "hurt" / "checkpoints") == [2, 3]  # nothing was set aside
    with caplog.at_level("WARNING"):
        train(tmp_path / "hurt")
    assert "a new run has the same, which are taken and written again" in caplog.text
    assert curve(tmp_path / "hurt") == curve(tmp_path / "whole")
    assert integrity.find_damage(part) == ""


def test_other_frozen_leaves_under_the_same_name_are_refused(tmp_path):
    train(tmp_path / "a", steps=2)
    other = Wide()
    other.seed = 1
    train(tmp_path / "b", other, steps=2)
    part = frozen_part(tmp_path / "a")
    shutil.rmtree(part)
    shutil.copytree(frozen_part(tmp_path / "b"), part)
    with pytest.raises(CheckpointError, match="holds leaves with the digest"):
        restore.load_model(Wide(), tmp_path / "a")


def test_a_copied_checkpoint_says_what_else_to_copy(tmp_path):
    model = train(tmp_path / "run", steps=2).model
    copy = tmp_path / "elsewhere" / "saved"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "2", copy)
    part = frozen_part(tmp_path / "run")
    with pytest.raises(CheckpointError) as caught:
        restore.load_model(Wide(), copy)
    assert f"to {copy}/frozen/{part.name}" in str(caught.value)
    shutil.copytree(part, copy / "frozen" / part.name)
    loaded, step = restore.load_model(Wide(), copy)
    assert step == 2
    np.testing.assert_array_equal(loaded.table[...], model.table[...])


def test_a_kill_while_frozen_leaves_are_written_leaves_nothing_half_done(tmp_path):
    train(tmp_path / "whole", steps=2)
    whole = frozen_part(tmp_path / "whole")
    left = tmp_path / "run" / "frozen"
    shutil.copytree(whole, left / whole.name)  # renamed, but not listed yet
    (left / whole.name / integrity.NAME).unlink()
    shutil.copytree(whole, left / f"{whole.name}.orbax-checkpoint-tmp")  # not renamed yet
    flip(largest(left / whole.name))
    train(tmp_path / "run", steps=2)
    assert integrity.find_damage(frozen_part(tmp_path / "run")) == ""


@pytest.mark.parametrize("has_frozen", [True, False])
def test_a_checkpoint_of_an_older_version_is_continued(tmp_path, has_frozen):
    """It has the frozen leaves in `state`, and one checksum for each file."""
    task = Wide() if has_frozen else Line()
    train(tmp_path / "whole", task)
    train(tmp_path / "old", task, stop=lambda step: step == 3, checkpoint_every=0)
    path = tmp_path / "old" / "checkpoints" / "3"
    as_older_version(path)
    if has_frozen:
        shutil.rmtree(tmp_path / "old" / "frozen")
        np.testing.assert_array_equal(
            restore.load_model(task, path)[0].table[...], task.pretrained({})["table"]
        )
    train(tmp_path / "old", task)
    assert curve(tmp_path / "old") == curve(tmp_path / "whole")


class Line(TinyTask):
    """All of it trains."""

    trainable = nnx.Variable


def as_older_version(path: pathlib.Path) -> None:
    """Rewrites a checkpoint as version 0.1 wrote it."""
    new = path.rename(path.with_name("new"))
    state = read_arrays(new, "state")
    meta = json.loads((new / "meta" / "meta.json").read_text())
    name = meta.pop("frozen")
    part = frozen.find(new, name)
    leaves = read_arrays(part, "leaves") if name else {}
    ocp.save_checkpointables(path, {"state": {**state, "frozen": leaves}})
    for folder in ("data", "meta"):
        shutil.copytree(new / folder, path / folder)
    (path / "meta" / "meta.json").write_text(json.dumps(meta))
    shutil.rmtree(new)
    listed = {
        file.relative_to(path).as_posix(): [file.stat().st_size, zlib.crc32(file.read_bytes())]
        for folder in ("state", "data", "meta")
        for file in (path / folder).rglob("*")
        if file.is_file()
    }
    (path / "files.json").write_text(json.dumps(listed))


LEAVES = {
    "a": np.arange(48, dtype=np.float32).reshape(8, 6),
    "b": np.arange(16, dtype=np.uint8),
    "c": np.array(True),
}


def test_a_digest_is_that_of_the_leaves_on_any_mesh():
    mesh = make_mesh(tensor=4)
    split = {
        "a": NamedSharding(mesh, PartitionSpec(("fsdp", "tensor"))),
        "b": NamedSharding(mesh, PartitionSpec("tensor")),
        "c": NamedSharding(mesh, PartitionSpec()),
    }
    found = frozen.digest(jax.device_put(LEAVES, jax.devices()[0]))
    assert frozen.digest(jax.device_put(LEAVES, split)) == found
    assert frozen.digest({}) != found


@pytest.mark.parametrize(
    "change",
    [
        {"a": LEAVES["a"].reshape(6, 8)},
        {"a": LEAVES["a"][:, ::-1].copy()},
        {"a": np.nextafter(LEAVES["a"], 1)},
        {"a": np.where(LEAVES["a"] == 0, np.float32(-0.0), LEAVES["a"])},
        {"a": LEAVES["a"].view(np.int32)},
        {"b": LEAVES["b"].astype(jnp.bfloat16)},
        {"c": np.array(False)},
        {"d": np.zeros(3, np.float32)},
    ],
)
def test_a_digest_depends_on_everything(change):
    first = jax.device_put(LEAVES, jax.devices()[0])
    assert frozen.digest({**first, **jax.device_put(change)}) != frozen.digest(first)


def test_checksums_go_by_pieces_and_by_process(tmp_path, monkeypatch):
    monkeypatch.setattr(integrity, "PIECE", 1000)
    names = ["state/manifest", *(f"state/ocdbt.process_{i}/d/x" for i in (0, 1, 10))]
    names += ["data/process_1-of-4.json", "state/array_metadatas/process_3", "state/empty"]
    rng = np.random.default_rng(0)
    for name in names:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(rng.bytes(0 if name.endswith("empty") else 2500))
    whole = integrity.checksums(tmp_path)
    assert set(whole) == set(names)
    content = (tmp_path / names[1]).read_bytes()
    pieces = (content[:1000], content[1000:2000], content[2000:])
    assert whole[names[1]] == [2500, *map(zlib.crc32, pieces)]
    shares = [integrity.checksums(tmp_path, (index, 4)) for index in range(4)]
    assert sorted(name for share in shares for name in share) == sorted(names)
    assert [sorted(share) for share in shares[1:]] == [
        [names[4], names[2]],
        [names[3]],
        [names[5]],
    ]
    integrity.write_list(
        tmp_path, {name: entry for share in shares for name, entry in share.items()}
    )
    assert integrity.find_damage(tmp_path) == ""
    file = tmp_path / names[3]
    content = bytearray(file.read_bytes())
    content[2400] ^= 4
    file.write_bytes(content)
    message = f"{names[3]} has another content than was written"
    assert integrity.find_damage(tmp_path) == message
    found = [integrity.find_damage(tmp_path, share=(index, 2)) for index in range(2)]
    assert found == [message, ""]  # 10 % 2 is 0
    # A list of an older version has one sum for the whole file.
    older = {name: [2500, zlib.crc32((tmp_path / name).read_bytes())] for name in names[:4]}
    integrity.write_list(tmp_path, older)
    assert integrity.find_damage(tmp_path) == ""


def test_only_own_files_are_read_for_checksums(tmp_path, monkeypatch):
    for index in range(2):
        (tmp_path / f"ocdbt.process_{index}").mkdir()
        (tmp_path / f"ocdbt.process_{index}" / "data").write_bytes(os.urandom(100))
    read: list[str] = []
    real = integrity._checksum

    def counted(path: pathlib.Path, *where: int) -> int:
        read.append(path.parent.name)
        return real(path, *where)

    monkeypatch.setattr(integrity, "_checksum", counted)
    integrity.write_list(
        tmp_path, integrity.checksums(tmp_path, (0, 2)) | integrity.checksums(tmp_path, (1, 2))
    )
    assert sorted(read) == ["ocdbt.process_0", "ocdbt.process_1"]
    read.clear()
    assert integrity.find_damage(tmp_path, share=(1, 2)) == ""
    assert read == ["ocdbt.process_1"]
