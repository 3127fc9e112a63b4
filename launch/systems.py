"""Finds the program of a system by its name.

`perception_jax/systems/NAME/program.py` makes objects of settings. A system that trains has the
functions of `Trains`, one that runs on images those of `Predicts`, one that runs on texts its own
`COMMANDS`.
"""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import ml_collections
from absl import flags

from launch.common import Define
from perception_jax import systems
from perception_jax.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import jax
    from flax import nnx
    from jax.sharding import Mesh

    from perception_jax.data.loader import Examples
    from perception_jax.inference.images import ImageResult
    from perception_jax.shard.plan import ProgramPlan
    from perception_jax.shard.slices import Slice
    from perception_jax.train.task import Batch, Task


class TrainingRecords(Protocol):
    """Training data before batching.

    Attributes:
      tokenizer: of the batches' "ids"; None without texts.
    """

    tokenizer: Any

    def examples(self, seed: int) -> Examples:
        """Returns records with the arrays that the model gets."""


@runtime_checkable
class Trains(Protocol):
    """Protocol of the program of a system that trains and evaluates."""

    def data(self, config: ml_collections.ConfigDict) -> TrainingRecords:
        """Opens the training data without reading weights."""

    def task(self, config: ml_collections.ConfigDict, loaded: Any = None) -> Task:
        """Makes the trainer's task, for the model of `load` if given."""

    def load(self, source: str, config: ml_collections.ConfigDict, mesh: Mesh | None = None) -> Any:
        """Loads a checkpoint onto the mesh; its `model` is the input of the task's evaluators."""

    def report(
        self, config: ml_collections.ConfigDict, task: Task, model: nnx.Module, folder: pathlib.Path
    ) -> None:
        """Evaluates and writes the results and a report into `folder`."""

    def finish(
        self, config: ml_collections.ConfigDict, task: Task, model: nnx.Module, folder: pathlib.Path
    ) -> None:
        """Runs after the last training step: report and export to the workdir."""


@runtime_checkable
class Plans(Protocol):
    """Protocol of the program of a system whose training step `launch.plan` compiles."""

    def shapes(self, config: ml_collections.ConfigDict) -> tuple[Task, Sequence[Batch]]:
        """Returns the task and the shapes of its global batches, without data and weights."""


@runtime_checkable
class Serves(Protocol):
    """Protocol of the program of a system whose steps of serving `launch.plan` compiles."""

    def serving_plans(
        self, config: ml_collections.ConfigDict, found: Slice, devices: Sequence[jax.Device]
    ) -> Sequence[ProgramPlan]:
        """Compiles the steps for a slice, without weights."""


@runtime_checkable
class Predicts(Protocol):
    """Protocol of the program of a system that `launch.predict` runs on images."""

    def define_flags(self, values: flags.FlagValues) -> None:
        """Defines the system's own flags, in addition to the common ones."""

    def predictor(self, values: flags.FlagValues) -> Callable[[pathlib.Path], ImageResult]:
        """Loads the model and returns a function for each image."""


@runtime_checkable
class HasCommands(Protocol):
    """Protocol of the program of a system that brings whole commands for `launch.predict`, because
    it runs on something else than images.

    Attributes:
      COMMANDS: by name, a function that defines all of the command's flags, and one that runs with
        their values and returns the exit code.
    """

    COMMANDS: Mapping[str, tuple[Define, Callable[[flags.FlagValues], int]]]


def names() -> list[str]:
    """Names of systems that have a program, in alphabetical order."""
    (folder,) = systems.__path__
    return sorted(path.parent.name for path in pathlib.Path(folder).glob("*/program.py"))


def training_program(config: ml_collections.ConfigDict) -> Trains:
    """The program that `config.system` names.

    Raises:
      ConfigError: it names none, or one that does not train.
    """
    return _named(config, (Trains,), "that trains")


def planning_program(config: ml_collections.ConfigDict) -> Plans | Serves:
    """The program that `config.system` names.

    Raises:
      ConfigError: it names none, or one without steps that can be planned.
    """
    return _named(config, (Plans, Serves), "whose steps can be planned")


def _named(config: ml_collections.ConfigDict, kinds: tuple[type, ...], which: str) -> Any:
    name = config.get("system")
    program = _program(name) if name in names() else None
    if not isinstance(program, kinds):
        known = [other for other in names() if isinstance(_program(other), kinds)]
        hint = did_you_mean(str(name), known)
        raise ConfigError(f"config.system: there is no system {name!r} {which}{hint}")
    return program


def predicting_programs() -> dict[str, Predicts]:
    """All programs that run on images, by the names of their systems."""
    found = {name: _program(name) for name in names()}
    return {name: one for name, one in found.items() if isinstance(one, Predicts)}


def commands() -> dict[str, tuple[Define, Callable[[flags.FlagValues], int]]]:
    """Flags and function of the commands that systems bring, by name."""
    programs = (_program(name) for name in names())
    found = (one.COMMANDS for one in programs if isinstance(one, HasCommands))
    return {name: command for some in found for name, command in some.items()}


def _program(name: str) -> Any:
    return importlib.import_module(f"{systems.__name__}.{name}.program")
