"""Plans of a training step: bytes, FLOPs and faults on CPU devices in place of a slice's."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from launch import common, plan, plan_text, systems
from perception_jax.errors import ConfigError
from perception_jax.shard import slices
from perception_jax.shard.plan import compiled
from perception_jax.testing import tiny_clip
from perception_jax.train.config import TrainConfig
from perception_jax.train.plan import make_plan, other_rows
from tests.slices import cpu_slice, tpu_test
from tests.tiny_training import Bucketed

ROWS = 40
SLICE = cpu_slice()


def planned(task=None, found=SLICE, optim=None, **mesh: int):
    task = task or tiny_clip.task(batch_size=ROWS)
    config = TrainConfig.from_mapping(
        {"steps": 10, "batch_size": ROWS, "mesh": mesh, "optim": optim or {}}
    )
    devices = jax.devices()[: found.chips]
    (batch,) = task.batch_shapes()
    return make_plan(task, config, batch, found, devices)


@pytest.fixture(scope="module")
def split():
    return planned(fsdp=4, tensor=2)


def test_numbers_of_a_plan(split):
    assert (split.slice, split.mesh) == ("cpus", {"replica": 1, "fsdp": 4, "tensor": 2})
    assert (split.fits, split.frozen, split.whole) == (True, 0, [])
    one = planned(found=dataclasses.replace(SLICE, chips=1))
    assert one.model_flops == split.model_flops
    assert split.hardware_flops >= split.model_flops
    # Parameters and two moments, whole on one chip.
    assert one.state_bytes == pytest.approx(3 * 4 * one.trained, rel=1e-3)
    assert split.state_bytes < one.state_bytes / 4
    halved = planned(found=dataclasses.replace(SLICE, chips=1), optim={"moment_dtype": "bfloat16"})
    assert halved.state_bytes == pytest.approx((4 + 2 + 4) * one.trained, rel=1e-3)
    batch = ROWS * (tiny_clip.SIZE**2 * 3 + 4 * tiny_clip.CONTEXT)
    assert one.argument_bytes == one.state_bytes + batch
    assert one.collective_bytes == {}
    assert set(split.collective_bytes) >= {"all-gather"}
    assert split.compute_seconds == split.hardware_flops / (8 * 1e12)
    assert split.communication_seconds == sum(split.collective_bytes.values()) / 1e10
    slowest = max(split.compute_seconds, split.memory_seconds, split.communication_seconds)
    assert split.step_seconds == slowest
    assert split.mfu_ceiling == pytest.approx(split.model_flops / (8 * 1e12 * slowest))
    path, size = split.replicated
    assert size == max(
        4 * math.prod(shape) for shape in ((tiny_clip.CONTEXT, 32), (5, 32), (64,), (2, 64))
    ), path


class Gathering:
    """A task that holds every image on every chip."""

    def __init__(self):
        self._task = tiny_clip.task(batch_size=ROWS)

    def __getattr__(self, name):
        return getattr(self._task, name)

    def loss(self, model, batch, key):
        whole = jax.lax.with_sharding_constraint(batch["image"], jax.sharding.PartitionSpec())
        return self._task.loss(model, {**batch, "image": whole}, key)


def test_a_batch_that_is_whole_on_a_chip_is_named(split):
    found = planned(Gathering(), fsdp=8)
    side = tiny_clip.SIZE
    assert any(f"[{ROWS}, {side}, {side}, 3]" in array for array in found.whole)
    text = "\n".join(plan_text.details({"remat": None, **found.to_json()}, 10, None))
    assert "WHOLE        on every chip: " in text
    assert "WHOLE" not in "\n".join(plan_text.details({"remat": None, **split.to_json()}, 10, 1.5))


def test_micro_batches_are_planned(split):
    """Fewer bytes for the same work, and what carries a micro-batch of all chips is named."""
    cut = planned(optim={"accumulate": 5}, fsdp=4, tensor=2)
    assert cut.accumulate == 5
    assert cut.whole == []
    assert cut.model_flops < split.model_flops  # of the comparisons between rows, a fifth
    assert cut.model_flops > 0.9 * split.model_flops
    text = "\n".join(plan_text.details({"remat": None, **cut.to_json()}, 10, None))
    assert "accumulation 5 micro-batches" in text
    found, side = planned(Gathering(), optim={"accumulate": 5}, fsdp=8), tiny_clip.SIZE
    assert any(f"[8, {side}, {side}, 3]" in array for array in found.whole)


def test_an_axis_as_long_as_the_batch_is_no_whole():
    """Only with another number of rows can the two be told apart."""
    rows = 32  # the towers' width
    task = tiny_clip.task(batch_size=rows)
    settings = TrainConfig.from_mapping({"steps": 1, "batch_size": rows, "mesh": {"fsdp": 8}})
    (batch,) = task.batch_shapes()
    found = make_plan(task, settings, batch, SLICE, jax.devices())
    assert found.whole == []


def test_a_program_that_jaxlib_cannot_read_is_planned_without_traffic(monkeypatch):
    """As some of libtpu's for v5p."""

    def unreadable(compiled):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure async-update")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", unreadable)
    found = planned(fsdp=4, tensor=2)
    assert (found.fits, found.collective_bytes, found.whole) == (True, None, [])
    assert found.communication_seconds is None
    assert found.step_seconds == max(found.compute_seconds, found.memory_seconds)
    assert found.compute_seconds > 0
    lines = {"remat": None, **found.to_json()}
    assert plan_text.row(lines).split()[-4] == "-"
    text = "\n".join(plan_text.details(lines, 10, None))
    assert "traffic      unknown, and whether an array is whole" in text
    assert "communication unknown" in text


def test_the_other_number_of_rows_is_the_next_that_is_no_axis():
    """So that it fits where the first fits: LoRA of rank 128 has axes of 128, 256 and 32."""
    assert other_rows(128, 128, 8, {128, 16, 256, 32, 4096}) == 384
    assert other_rows(128, 128, 8, {128, 16, 256, 32, 384, 64}) == 640
    assert other_rows(32_768, 256, 1, {512, 768}) == 33_024


def test_what_does_not_fit_is_said_with_advice(split):
    small = dataclasses.replace(SLICE, hbm=split.total_bytes - 1)
    found = planned(found=small, fsdp=4, tensor=2)
    assert not found.fits
    lines = {"remat": "none", **found.to_json()}
    text = plan_text.advice(lines, 8)
    assert "--config.remat=full" in text
    assert "or a larger slice." in text
    assert "a batch of about" in text
    assert "2 micro-batches (train.optim.accumulate)" in text
    assert "state alone" in plan_text.advice({**lines, "available_bytes": found.state_bytes - 1}, 8)
    assert " NO " in plan_text.row(lines)


class Similar:
    """A task that holds the similarities of all pairs on every chip."""

    def __init__(self):
        self._task = tiny_clip.task(batch_size=ROWS)

    def __getattr__(self, name):
        return getattr(self._task, name)

    def loss(self, model, batch, key):
        loss, metrics = self._task.loss(model, batch, key)
        rows = jnp.mean(batch["image"].astype(jnp.float32), axis=(1, 2))
        whole = jax.lax.with_sharding_constraint(rows @ rows.T, jax.sharding.PartitionSpec())
        return loss, {**metrics, "mean": jnp.mean(jnp.sort(whole))}


def test_similarities_of_all_pairs_on_a_chip_are_named():
    found = planned(Similar(), fsdp=8)
    assert any(array.endswith(f"f32[{ROWS}, {ROWS}]") for array in found.whole)


def test_every_shape_of_a_config_is_planned_and_the_largest_decides(monkeypatch, tmp_path, capsys):
    task = Bucketed(buckets=(3, 50_000))
    monkeypatch.setattr(systems, "planning_program", lambda _: Shapes(task))
    settings = ml_collections.ConfigDict({"train": {"steps": 9, "batch_size": 16}})
    short, long = (made.to_json() for made in plan.made(settings, SLICE, jax.devices()))
    assert short["batch"]["text"] == "float32[16, 3, 6]"
    assert long["batch"]["text"] == "float32[16, 50000, 6]"
    assert short["model_flops"] < long["model_flops"]
    small = dataclasses.replace(SLICE, hbm=long["total_bytes"] - 1)
    steps = [made.to_json() for made in plan.made(settings, small, jax.devices())]
    assert [step["fits"] for step in steps] == [True, False]
    monkeypatch.setattr(plan, "compiled", lambda *_: steps)
    words = [
        "--config=configs/clip/scenes.py:runlocal",
        "--slice=v5e-8",
        f"--json={tmp_path / 'p'}",
    ]
    assert common.main(plan.PROGRAM, plan.run, words) == 1
    printed = capsys.readouterr().out
    assert " training 1 " in printed
    assert " training 2 " in printed
    assert "batch        image float32[16, 12], text float32[16, 50000, 6]" in printed
    assert [step["step"] for step in json.loads((tmp_path / "p").read_text())] == [
        "training 1",
        "training 2",
    ]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A program whose training step can be planned."""

    task: Bucketed

    def shapes(self, config):
        return self.task, self.task.batch_shapes()


class Refused(jax.stages.Lowered):
    """A program that the compiler refuses."""

    def __init__(self, message: str):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_the_compilers_refusal_is_read():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (72.05G) exceeds available HBM (15.75G). HLO module: jit_f."
    )
    done = compiled(Refused(message))
    assert (done.program, done.required) == (None, int(72.05 * 2**30))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compiled(Refused("INTERNAL: a fault of the compiler (1.00G)"))


def test_a_refused_program_is_planned_without_traffic(monkeypatch):
    message = "RESOURCE_EXHAUSTED: memory required (1.00G) exceeds available HBM (0.50G)"

    def refuse(lowered, *arguments, **options):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    found = planned(fsdp=8)
    assert (found.fits, found.total_bytes, found.temporary_bytes) == (False, None, 2**30)
    assert (found.collective_bytes, found.communication_seconds) == (None, None)
    text = "\n".join(plan_text.details({"remat": None, **found.to_json()}, 10, None))
    assert "communication unknown" in text
    assert "the compiler refused the program" in text


def test_slices_have_googles_names():
    assert slices.find("v5p-128") == slices.Slice(
        name="v5p-128",
        topology="v5p:4x4x4",
        chips=64,
        hbm=slices.find("v5p-8").hbm,
        flops=459e12,
        hbm_bandwidth=2765e9,
        ici_bandwidth=600e9,
        dcn_bandwidth=6.25e9,
    )
    two = slices.find("2xv5p-128")
    assert (two.name, two.topology, two.chips, two.slices) == ("2xv5p-128", "v5p:4x4x4", 128, 2)
    for name in slices.names():
        found = slices.find(name)
        sides = found.topology.partition(":")[2].split("x")
        assert math.prod(map(int, sides)) == found.chips
    with pytest.raises(ConfigError, match=r"found 'v5e-15'\. Did you mean v5e-1\?"):
        slices.find("v5e-15")
    with pytest.raises(ConfigError, match="needs a process of its own with JAX_PLATFORMS=cpu"):
        slices.devices(slices.find("v5e-1"))


def test_systems_that_train_can_be_planned():
    for file, rows in (
        ("configs/clip/scenes.py", 128),
        ("configs/clip/vit_b16.py", 32_768),
        ("configs/clip/vit_l14_336.py", 32_768),
        ("configs/siglip/so400m14_384.py", 32_768),
        ("configs/give/clip_b16.py", 1024),
    ):
        settings, _ = common.load_config(file)
        settings = ml_collections.ConfigDict(json.loads(settings.to_json_best_effort()))
        task, batches = systems.planning_program(settings).shapes(settings)
        assert {leaf.shape[0] for leaf in jax.tree.leaves(batches)} == {rows}
        assert task.shardings


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--slice=v5e-17"], "expected a TPU slice, found 'v5e-17'"),
        (
            ["--slice=v5e-16", "--config.system=clip"],
            "there is no system 'clip' whose steps can be planned",
        ),
        ([], "--slice"),
    ],
)
def test_faults_on_the_command_line(flags, message, capsys):
    words = ["--config=configs/clip/scenes.py:runlocal", *flags]
    assert common.main(plan.PROGRAM, plan.run, words) in (1, 2)
    assert message in capsys.readouterr().err


@tpu_test
def test_a_step_is_compiled_for_a_slice(tmp_path, capsys):
    config = "--config=configs/clip/scenes.py:runlocal"
    words = [config, "--slice=v5e-4", f"--json={tmp_path / 'plan.json'}", "--price=1.2"]
    assert common.main(plan.PROGRAM, plan.run, words) == 0
    (found,) = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"]
    assert found["whole"] == []
    assert found["temporary_bytes"] > 0
    assert "all-gather" in found["collective_bytes"]
    assert "at least 0.00 h for 12 steps" in capsys.readouterr().out
    # Two slices: only the sums of gradients go from one to the other.
    replicas = [*words, "--config.train.mesh.replica=2", "--config.train.mesh.fsdp=4"]
    assert common.main(plan.PROGRAM, plan.run, [*replicas, "--slice=2xv5e-4"]) == 0
    (two,) = json.loads((tmp_path / "plan.json").read_text())
    assert two["mesh"] == {"replica": 2, "fsdp": 4, "tensor": 1}
    assert two["fits"]
    assert two["whole"] == []
    assert two["dcn_bytes"] > found["dcn_bytes"] == 0
    # Of the gradients, those that are split over a slice are sent by parts.
    assert two["dcn_bytes"] < 2 * 4 * two["trained"]
    assert "to slices " in capsys.readouterr().out
    # A mesh that the batch does not fit ends in the worker and is said once.
    assert common.main(plan.PROGRAM, plan.run, [config, "--slice=v5e-64"]) == 1
    assert "v5e-64: batch_size 32 must be divisible" in capsys.readouterr().err


@tpu_test
def test_the_smallest_published_config_fits_v5e_16(tmp_path):
    words = ["--config=configs/give/clip_b16.py", "--slice=v5e-16", f"--json={tmp_path / 'plan'}"]
    assert common.main(plan.PROGRAM, plan.run, words) == 0
    (found,) = json.loads((tmp_path / "plan").read_text())
    assert found["fits"]
    assert found["whole"] == []
    assert found["total_bytes"] < 3 * 2**30  # of 15.75 GiB
    # The frozen backbone is split too, in float32; what trains has two moments.
    assert found["state_bytes"] < 1.15 * 4 * (3 * found["trained"] + found["frozen"]) / 16 + 2**22
    assert found["replicated"][1] < 4 * 2**20
    assert found["model_flops"] < found["hardware_flops"] < 1.4 * found["model_flops"]
    # Layers are gathered in bfloat16, one after another; no batch of tokens is.
    assert sum(found["collective_bytes"].values()) < 2.5 * 2 * (found["trained"] + found["frozen"])
    # 5.4 % since the count includes what lies behind attention kernels and loops.
    assert found["communication_seconds"] < 0.06 * found["compute_seconds"]
