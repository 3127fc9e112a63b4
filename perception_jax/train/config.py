"""Settings of a training run as frozen dataclasses.

Config files hold plain mappings; `TrainConfig.from_mapping` turns one into dataclasses and names
the nearest valid key for a wrong one, so that a typo fails here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from perception_jax.errors import ConfigError, did_you_mean
from perception_jax.shard.mesh import MeshConfig

T = TypeVar("T")
"""Type of a dataclass."""


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name}: expected {expected}, found {value!r}.")


@dataclasses.dataclass(frozen=True)
class OptimRule:
    """Optimizer settings of leaves whose path contains `pattern`; the first matching rule applies.

    Attributes:
      pattern: regex, searched anywhere in the "/"-joined path.
      multiplier: of the learning rate; None or 0 freezes the leaf: no gradient, no updates, no
        optimizer state, and checkpoints refer to it as to leaves that the task does not train.
      weight_decay: True takes `OptimConfig.weight_decay`, False none, a number itself.
    """

    pattern: str
    multiplier: float | None = 1.0
    weight_decay: bool | float = True

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(
                f"optim.rules: expected a regular expression, found {self.pattern!r} ({error})."
            ) from error
        factor, decay = self.multiplier, self.weight_decay
        _require(factor is None or 0 <= factor < math.inf, "multiplier", factor, "0 or more")
        _require(0 <= decay < math.inf, "weight_decay", decay, "0 or more")

    @property
    def freezes(self) -> bool:
        """Whether leaves of this rule do not train."""
        return not self.multiplier


DEFAULT_RULES = (
    OptimRule(r"(^|/)(bias|scale|logit_scale|logit_bias)$", weight_decay=False),
    OptimRule(r".*"),
)
"""Rules without weight decay for norms and biases."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Settings of the optimizer and its schedule. A step is an update.

    Attributes:
      name: "adamw", "lion", "sgd" (with momentum), "adafactor" (factored second moments) or "muon":
        orthogonalised momentum (Jordan et al., 2024) for the leaves that `matrices` names, adamw
        for the others; learning rates and decay are on adamw's scale for both.
      learning_rate: the peak of the schedule.
      schedule: after a linear warm-up over `warmup_steps`: "constant"; "cosine" or "linear" down
        to `final_fraction` of the peak at the last step; "rsqrt" falls like 1/sqrt(step) once
        `timescale` steps are done.
      zero_start: whether the first update of a warm-up has the rate 0, as with `transformers`.
      b1, b2, eps: of the moments; `b1` is also sgd's and adafactor's momentum.
      moment_dtype: of the first moments (momentum); "bfloat16" halves their memory. Second moments
        stay float32: with b2 = 0.999 a bfloat16 number would never fall, since a step of 0.1 % is
        less than half the distance to the next one.
      weight_decay: decoupled: per step, `learning rate * weight_decay * parameter` is subtracted.
      clip_norm: largest global norm of a gradient; None does not clip.
      accumulate: micro-batches into which the rows of an update are cut, one after another; see
        `train.accumulate`. Memory is that of one. Contrastive losses compare the rows of one
        micro-batch only, so that it changes their value.
      accumulate_mean: "equal" weights micro-batches the same, as the Trainer of `transformers` did
        before its version 4.46; "tokens" by the metric of that name, which gives the mean over the
        tokens of all.
      ema: decay of an exponential moving average of the parameters, e.g. 0.9999; evaluators and
        the result then see the average. None keeps none.
      matrices: regex of paths; what of "muon" goes by matrices. Their last two axes are inputs
        and outputs.
      rules: every leaf that trains must match one.
    """

    name: Literal["adamw", "lion", "sgd", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "linear", "rsqrt"] = "cosine"
    warmup_steps: int = 0
    zero_start: bool = False
    final_fraction: float = 0.0
    timescale: int = 10_000
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    weight_decay: float = 1e-4
    clip_norm: float | None = 1.0
    accumulate: int = 1
    accumulate_mean: Literal["equal", "tokens"] = "equal"
    ema: float | None = None
    matrices: str = r"(^|/)blocks/.*kernel$"
    rules: tuple[OptimRule, ...] = DEFAULT_RULES

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "positive")
        _require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        _require(0 <= self.b1 < 1, "b1", self.b1, "in [0, 1)")
        _require(0 <= self.b2 < 1, "b2", self.b2, "in [0, 1)")
        _require(0 < self.eps < 1, "eps", self.eps, "in (0, 1)")
        _require(0 <= self.weight_decay < 10, "weight_decay", self.weight_decay, "in [0, 10)")
        _require(0 <= self.final_fraction <= 1, "final_fraction", self.final_fraction, "in [0, 1]")
        _require(self.timescale >= 1, "timescale", self.timescale, "1 or more")
        _require(self.accumulate >= 1, "accumulate", self.accumulate, "1 or more")
        _require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "> 0")
        _require(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "None or in (0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
      steps: updates, counted from the start of the run, resumes included.
      batch_size: rows of an update over all hosts; checked against the loader's batches.
      seed: of the initial parameters and of the keys that `Task.loss` gets.
      log_every: steps between lines of the log.
      evaluate_every: steps between evaluations; 0 evaluates at the end only.
      checkpoint_every: steps between checkpoints; 0 saves at the end (or on SIGTERM) only.
      keep: how many of the latest checkpoints stay.
      keep_best: name of an evaluation metric such as "evaluate/zero_shot/top1" (larger is better;
        a leading "-" means smaller is): the best checkpoint by it stays too. "" for none.
      compute_dtype: dtype to which parameters are cast inside the step; the parameters that the
        optimizer updates stay as the model made them (float32).
      frozen_dtype: dtype in which leaves that do not train are loaded, kept and saved; "float32"
        keeps that of the model. "bfloat16" halves their memory, and changes nothing but rounding
        where `compute_dtype` is bfloat16 anyway.
      watchdog_seconds: without a step, after which the log and a file in the workdir say where each
        thread is; 0 for 20 times the median step, at least 60 s.
      heartbeat_seconds: without a sign of life from one of several processes, after which the
        others name it and end.
      deterministic: the same bits on 1, 2, 4, … devices, at a price in speed and memory; see
        `train.deterministic`.
      deterministic_parts: parts of a batch for it, a power of 2 and at least the number of devices.
        Another number gives other bits.
      tensorboard: also writes TensorBoard files (needs `pip install tensorboardX`).
      profile_at: first of `profile_steps` steps whose trace (`jax.profiler`) process 0 writes to
        `profile/` in the workdir; 0 traces none.
    """

    steps: int
    batch_size: int
    seed: int = 0
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    log_every: int = 50
    evaluate_every: int = 0
    checkpoint_every: int = 1000
    keep: int = 3
    keep_best: str = ""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    deterministic: bool = False
    deterministic_parts: int = 8
    tensorboard: bool = False
    watchdog_seconds: float = 0.0
    heartbeat_seconds: float = 60.0
    profile_at: int = 0
    profile_steps: int = 3

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "keep", "profile_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2**32 - 1")
        _require(
            self.batch_size % self.optim.accumulate == 0,
            "optim.accumulate",
            self.optim.accumulate,
            f"a divisor of {self.batch_size}, the rows of an update (batch_size)",
        )
        if self.deterministic:
            parts = self.deterministic_parts
            holds = parts > 0 and self.batch_size % parts == 0
            _require(
                holds, "deterministic_parts", parts, f"a divisor of {self.batch_size}, the batch"
            )
            accumulate = self.optim.accumulate
            _require(accumulate == 1, "optim.accumulate", accumulate, "1 with deterministic")
        for name in ("evaluate_every", "checkpoint_every", "watchdog_seconds", "profile_at"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(
            self.heartbeat_seconds >= 1, "heartbeat_seconds", self.heartbeat_seconds, "1 or more"
        )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> TrainConfig:
        """Builds a config from nested mappings; `optim.rules` may be rows of tuples.

        Raises:
          ConfigError: an unknown key (named with the nearest valid one), a missing one, or a
            value of the wrong type.
        """
        return build_dataclass(cls, mapping)


def build_dataclass(cls: type[T], values: Any, where: str = "") -> T:
    """Turns a mapping (or, for rows such as `OptimRule`, a tuple) into the dataclass `cls`.

    Args:
      where: dotted path of the mapping, for messages.

    Raises:
      ConfigError: see `TrainConfig.from_mapping`.
    """
    if isinstance(values, cls):
        return values
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if isinstance(values, list | tuple):
        if len(values) > len(fields):
            raise ConfigError(f"{where}: at most {len(fields)} values ({', '.join(fields)}).")
        values = dict(zip(fields, values, strict=False))
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or cls.__name__}: expected a mapping, found {values!r}.")
    for key in values:
        if key not in fields:
            raise ConfigError(_unknown_key(str(key), where, list(fields)))
    for field in fields.values():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise ConfigError(f"{_join(where, field.name)} is missing; {cls.__name__} needs it.")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _convert(hints[key], v, _join(where, key)) for key, v in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build_dataclass(hint, value, where)
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        inner = typing.get_args(hint)[0]
        return tuple(_convert(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    if not _is_a(hint, value):
        shown = " or ".join(_names(hint))
        raise ConfigError(f"{where}: expected {shown}, found {value!r} ({type(value).__name__}).")
    wants_float = hint is float or (float in typing.get_args(hint) and type(value) is int)
    return float(value) if wants_float else value


def _is_a(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_is_a(option, value) for option in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _names(hint: Any) -> list[str]:
    if typing.get_origin(hint) is None:
        return [hint.__name__]
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return [repr(argument) for argument in arguments]
    return ["None" if argument is type(None) else argument.__name__ for argument in arguments]


def _unknown_key(key: str, where: str, valid: list[str]) -> str:
    full = [_join(where, name) for name in valid]
    hint = did_you_mean(_join(where, key), full)
    return f"{_join(where, key)}: there is no such setting{hint} Valid: {', '.join(valid)}."


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
