"""The launcher of Cloud TPU slices, run against a make-believe cloud, and the JobSet of GKE."""

from __future__ import annotations

import json
import math
import pathlib
import re
import shlex
import subprocess
import tomllib
from typing import Any

import jsonschema
import pytest
import yaml
from absl import flags

from launch import common
from launch.cloud import jobset
from perception_jax.errors import ConfigError
from perception_jax.shard import slices
from tests import fake_cloud

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLOUD = ROOT / "launch" / "cloud"
COMMAND = [
    *("python", "-m", "launch.train", "--config=configs/clip/scenes.py"),
    *("--config.data.caption_weights", "(1.0,2.0)"),
    "--workdir=/mnt/runs/it's mine; $HOME",
]
PLACE = ["--name=vit", "--zone=us-west4-a", "--project=my project"]
OPTIONS = [*PLACE, "--slice=v5e-16", "--spot", "--image=registry/vit:1", "--mount=/mnt/runs"]
RUN = ["run", *OPTIONS, "--poll=1", "--grace=2", "--", *COMMAND]


def tpu(folder: pathlib.Path, *words: str, **happens: Any) -> subprocess.CompletedProcess[str]:
    """Runs the script against a cloud in which that happens."""
    return subprocess.run(
        ["bash", str(CLOUD / "tpu.sh"), *words],
        env=fake_cloud.install(folder, **happens),
        capture_output=True,
        text=True,
        timeout=60,
    )


def verbs(calls: list[list[str]]) -> list[str]:
    """What the calls of gcloud do; looks at the state are left out."""
    return [words[3] for words in calls if words[3] != "describe"]


def printed_calls(text: str) -> list[list[str]]:
    """The calls of gcloud in a dry run's output."""
    calls: list[list[str]] = []
    for word in shlex.split(text):
        if word == "gcloud":
            calls.append([])
        else:
            calls[-1].append(word)
    return calls


def test_a_dry_run_prints_the_commands_of_a_preempted_job_and_runs_none(tmp_path):
    options = [*OPTIONS, "--setup=mountpoint -q /mnt/runs || sudo mount -a", "--delete"]
    done = tpu(tmp_path, "run", *options, "--dry_run", "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    assert fake_cloud.read(tmp_path)["calls"] == []
    calls = printed_calls(done.stdout)
    run = ["ssh", "ssh"]  # starts the containers, follows them
    assert verbs(calls) == ["create", *run, "ssh", "delete", "create", *run, "delete"]
    for words in calls:
        assert words[:2] == ["compute", "tpus"]
        assert {"--zone=us-west4-a", "--project=my project", "--quiet"} < set(words)
        assert ("--worker=all" in words) == (words[3] == "ssh")
    (create, *_) = [words for words in calls if words[3] == "create"]
    assert {"--node-id=vit", "--accelerator-type=v5litepod-16", "--spot"} < set(create)
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create
    scripts = [w.removeprefix("--command=") for words in calls for w in words if "docker run" in w]
    assert len(scripts) == 2
    assert scripts[0] == scripts[1]  # after the preemption the same
    _, setup, *_, start = scripts[0].splitlines()
    assert setup == "mountpoint -q /mnt/runs || sudo mount -a"
    words = shlex.split(start.removesuffix(" >/dev/null"))
    image = words.index("registry/vit:1")
    assert words[image + 1 :] == COMMAND
    assert {"--volume=/mnt/runs:/mnt/runs", "--env=PERCEPTION_JAX_DISTRIBUTED=1"} < set(words)


def test_a_slice_is_created_awaited_used_and_deleted(tmp_path):
    states = ["NONE", "ACCEPTED", "ERROR", "PROVISIONING", "ACTIVE"]
    done = tpu(tmp_path, "run", *OPTIONS, "--delete", "--", *COMMAND, states=states)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(": step 1\n")
    cloud = fake_cloud.read(tmp_path)
    assert verbs(cloud["calls"]) == ["create", "ssh", "ssh", "delete"]
    assert cloud["started"] == [COMMAND]


@pytest.mark.parametrize("code", [75, 1])  # the stopped process, and one that lost another
def test_a_preempted_job_goes_on_on_a_new_slice(tmp_path, code):
    states = ["ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", "NONE", "ACTIVE"]
    done = tpu(tmp_path, *RUN, states=states, codes=[code, 0])
    assert done.returncode == 0, done.stderr
    cloud = fake_cloud.read(tmp_path)
    assert verbs(cloud["calls"]) == ["ssh", "ssh", "ssh", "delete", "create", "ssh", "ssh"]
    assert cloud["started"] == [COMMAND, COMMAND]
    assert "delete it: " in done.stderr  # the slice that costs is named


def test_a_command_that_fails_is_not_started_again(tmp_path):
    done = tpu(tmp_path, *RUN, codes=[3])
    assert done.returncode == 3
    cloud = fake_cloud.read(tmp_path)
    assert cloud["started"] == [COMMAND]
    assert verbs(cloud["calls"]) == ["ssh", "ssh", "ssh"]


def test_a_slice_that_cannot_be_had_is_an_error(tmp_path):
    done = tpu(tmp_path, *RUN, states=["NONE", "ACCEPTED", "FAILED"])
    assert done.returncode == 1
    assert "vit could not be created" in done.stderr
    assert verbs(fake_cloud.read(tmp_path)["calls"]) == ["create"]


def test_what_is_left_of_a_failed_request_is_replaced(tmp_path):
    done = tpu(tmp_path, "create", *OPTIONS, states=["FAILED", "NONE", "ACTIVE"])
    assert done.returncode == 0, done.stderr
    assert verbs(fake_cloud.read(tmp_path)["calls"]) == ["delete", "create"]


def test_a_slice_that_someone_deletes_is_not_created_again(tmp_path):
    done = tpu(tmp_path, *RUN, states=["ACTIVE", "ACTIVE", "NONE"], codes=[75])
    assert done.returncode == 1
    assert "vit was deleted" in done.stderr
    assert verbs(fake_cloud.read(tmp_path)["calls"]) == ["ssh", "ssh", "ssh"]


def test_a_state_that_cannot_be_read_is_an_error(tmp_path):
    done = tpu(tmp_path, *RUN, states=["ERROR"])
    assert done.returncode == 1
    assert "INTERNAL: try later" in done.stderr
    assert len(fake_cloud.read(tmp_path)["calls"]) == 5


def test_a_job_stopped_by_its_host_goes_on_but_not_for_ever(tmp_path):
    done = tpu(tmp_path, *RUN[: -len(COMMAND) - 1], "--max_restarts=2", "--", *COMMAND, codes=[75])
    assert done.returncode == 1
    assert "gave up after 2 restarts" in done.stderr
    assert len(fake_cloud.read(tmp_path)["started"]) == 3


def test_a_broken_connection_does_not_start_the_command_again(tmp_path):
    done = tpu(tmp_path, *RUN, ssh=[None, 255, None, None], looks=0, codes=[0])
    assert done.returncode == 0, done.stderr  # it had ended meanwhile
    done = tpu(tmp_path, *RUN, ssh=[None, 255, 255], codes=[0])
    assert done.returncode == 255  # cannot be reached, and was not preempted
    assert fake_cloud.read(tmp_path)["started"] == [COMMAND]


def test_a_command_that_runs_is_attached_to(tmp_path):
    # Found running at the start, and again when the first connection to its output broke.
    cloud = {"ssh": [None, 255, None, None], "looks": 2, "codes": [0]}
    environment = fake_cloud.install(tmp_path, **cloud)
    state = fake_cloud.read(tmp_path)
    (tmp_path / "cloud.json").write_text(json.dumps({**state, "container": 0}))
    done = subprocess.run(
        ["bash", str(CLOUD / "tpu.sh"), *RUN],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "runs already" in done.stdout
    found = fake_cloud.read(tmp_path)
    assert found["started"] == []
    assert verbs(found["calls"]) == ["ssh", "ssh", "ssh", "ssh"]


def test_stop_ends_a_run_without_another_start(tmp_path):
    done = tpu(tmp_path, *RUN, codes=[75], removed=True)
    assert done.returncode == 75
    assert fake_cloud.read(tmp_path)["started"] == [COMMAND]
    done = tpu(tmp_path, "stop", *PLACE, "--dry_run")
    ((*_, command, _, _, _),) = printed_calls(done.stdout)
    assert command == "--command=sudo docker stop --time=600 vit && sudo docker rm vit"


@pytest.mark.parametrize("command", ["status", "delete", "logs", "create"])
def test_every_command_has_a_dry_run(tmp_path, command):
    done = tpu(tmp_path, command, *OPTIONS, "--worker=3", "--dry_run")
    assert done.returncode == 0, done.stderr
    calls = printed_calls(done.stdout)
    assert fake_cloud.read(tmp_path)["calls"] == []
    assert verbs(calls) == {"status": [], "logs": ["ssh"]}.get(command, [command])
    if command == "logs":
        assert "--worker=3" in calls[0]
    if command == "delete":
        assert "--force" in calls[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected a command"),
        (["fly", *PLACE], "unknown command fly"),
        (["status", "--name=a", "--zone=b"], "--project is missing"),
        (["create", *PLACE], "--slice is missing"),
        (["create", *PLACE, "--slice=v2-8"], "found 'v2-8'"),
        (["run", *PLACE, "--slice=v5e-4", "--", "true"], "--image is missing"),
        (["run", *OPTIONS], "behind --"),
        (["run", *OPTIONS, "--polls=3"], "unknown option --polls=3"),
        (["logs", *PLACE, "--worker=one"], "--worker: expected a number"),
        (["run", *OPTIONS, "--poll=0", "--", "true"], "--poll: expected at least 1"),
    ],
)
def test_a_wrong_command_line_is_explained(tmp_path, words, message):
    done = tpu(tmp_path, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert fake_cloud.read(tmp_path)["calls"] == []


def test_every_option_is_explained():
    head, _, code = (CLOUD / "tpu.sh").read_text().partition("set -euo pipefail")
    options = set(re.findall(r"^ +(--[a-z_]+)(?:=\*)?\)", code, re.MULTILINE))
    assert len(options) > 10
    assert {option for option in options if option not in head} == set()
    values = flags.FlagValues()
    jobset.define_flags(values)
    section = (ROOT / "launch" / "README.md").read_text().partition("### GKE: JobSet")[2]
    assert {name for name in values if f"--{name}" not in section} == set()


def rendered(*words: str) -> Any:
    given = ["--name=vit", "--image=registry/vit:1", "--claim=runs", *words, "--", *COMMAND]
    parsed = common.parse(given, jobset.PROGRAM)
    return yaml.safe_load(jobset.rendered(parsed.flags, parsed.rest))


def schema() -> jsonschema.Draft202012Validator:
    text = (ROOT / "tests" / "jobset_schema.json").read_text()
    return jsonschema.Draft202012Validator(json.loads(text))


@pytest.mark.parametrize("name", slices.names())
def test_the_jobset_of_every_slice_is_valid(name):
    found = rendered(f"--slice={name}", "--spot", "--queue=team")
    schema().validate(found)
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"]
    assert job["parallelism"] * chips == slices.find(name).chips
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert math.prod(map(int, topology.split("x"))) == slices.find(name).chips
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert container["args"] == COMMAND
    assert found["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}


def test_a_stopped_pod_restarts_the_jobset_and_does_not_count():
    spec = rendered("--slice=v5e-16")["spec"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    policy = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    (codes,) = [rule["onExitCodes"]["values"] for rule in policy if "onExitCodes" in rule]
    text = (CLOUD / "Dockerfile").read_text()
    assert codes == [int(re.search(r"PERCEPTION_JAX_STOPPED_CODE=(\d+)", text)[1])]
    assert f"readonly STOPPED={codes[0]}" in (CLOUD / "tpu.sh").read_text()


@pytest.mark.parametrize(
    "place",
    [
        ("spec", "failurePolicy", "rules", 0, "action"),
        ("spec", "replicatedJobs", 0, "template", "spec", "parallelism"),
        (*("spec", "replicatedJobs", 0, "template", "spec", "template", "spec"), "restartPolicy"),
    ],
)
def test_the_schema_refuses_other_values_and_names(place):
    found = rendered("--slice=v5e-16")
    parent = found
    for key in place[:-1]:
        parent = parent[key]
    value = parent.pop(place[-1])
    with pytest.raises(jsonschema.ValidationError):
        schema().validate(found)
    parent[place[-1]] = f"{value}s"
    with pytest.raises(jsonschema.ValidationError):
        schema().validate(found)
    parent |= {place[-1]: value, f"{place[-1]}s": value}
    with pytest.raises(jsonschema.ValidationError):
        schema().validate(found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slice=v5e-3"], "expected a TPU slice"),
        (["--slice=v5e-4", "--name=My Job"], "at most 40 lower-case letters"),
    ],
)
def test_what_gke_would_refuse_is_refused_before(words, message):
    with pytest.raises(ConfigError, match=message):
        rendered(*words)


def test_the_jobset_is_written_to_a_file(tmp_path):
    out = tmp_path / "vit.yaml"
    words = ["--slice=v5e-4", "--name=vit", "--image=i", "--claim=runs", f"--out={out}"]
    assert common.main(jobset.PROGRAM, jobset.run, [*words, "--", "true"]) == 0
    schema().validate(yaml.safe_load(out.read_text()))
    assert common.main(jobset.PROGRAM, jobset.run, words) == 1  # no command


def test_the_container_file_installs_and_copies_what_is_there():
    text = (CLOUD / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    found: dict[str, list[list[str]]] = {}
    for instruction, *words in lines:
        found.setdefault(instruction, []).append(words)
    assert set(found) == {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "ENTRYPOINT", "CMD"}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = re.fullmatch(r"python:(\d+\.\d+)-slim", found["FROM"][0][0])[1]
    assert f">={version}" == settings["requires-python"]
    (extras,) = re.findall(r'"\.\[(.+?)\]"', text)
    assert set(extras.split(",")) <= set(settings["optional-dependencies"])
    copied = [word for words in found["COPY"] for word in words[:-1]]
    assert all((ROOT / word).exists() for word in copied)
    assert {"perception_jax", "configs", "launch"} <= set(copied)
    kept = (CLOUD / "Dockerfile.dockerignore").read_text().splitlines()
    assert {word.split("/")[0] for word in copied} <= {line.removeprefix("!") for line in kept}
    assert json.loads(" ".join(found["ENTRYPOINT"][0])) == ["tini", "--"]
