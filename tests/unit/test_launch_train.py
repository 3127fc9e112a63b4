"""The exit code of `launch.train` says whether a run is done, where a variable asks for that."""

from __future__ import annotations

import pytest
from flax import nnx

from launch import common, train
from perception_jax.train import loop
from perception_jax.train.interrupt import Stopped

ARGUMENTS = ["--config=configs/clip/scenes.py:runlocal", "--workdir=unused"]


def stopped_early(*_, **__):
    raise Stopped


def stopped_later(*_, **__):
    return loop.TrainResult(model=nnx.Module(), metrics={}, step=3, finished=False)


@pytest.mark.parametrize("ends", [stopped_early, stopped_later])
@pytest.mark.parametrize(("variable", "code"), [(None, 0), ("75", 75)])
def test_a_stopped_run_exits_with_the_code_of_the_variable(
    root, monkeypatch, capsys, ends, variable, code
):
    monkeypatch.chdir(root)
    monkeypatch.setattr(loop, "run", ends)
    if variable is not None:
        monkeypatch.setenv(train.STOPPED_CODE, variable)
    assert common.main(train.PROGRAM, train.run, ARGUMENTS) == code
    assert "the same command" in capsys.readouterr().out


@pytest.mark.parametrize("variable", ["yes", "-1", "256", ""])
def test_what_is_no_exit_code_is_refused_before_training(root, monkeypatch, capsys, variable):
    monkeypatch.chdir(root)
    monkeypatch.setattr(loop, "run", None)
    monkeypatch.setenv(train.STOPPED_CODE, variable)
    assert common.main(train.PROGRAM, train.run, ARGUMENTS) == 1
    assert f"{train.STOPPED_CODE}: expected an exit code" in capsys.readouterr().err
