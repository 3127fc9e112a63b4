"""The language of name rules: one table per model, applied in both directions.

    RuleTable(
        rules=(
            *linear("encoder.layers.{i}.fc1", "blocks/mlp/fc1"),
            Rule("blocks.{i}.attn.qkv.weight",
                 ("blocks/q/kernel", "blocks/k/kernel", "blocks/v/kernel"), SPLIT_LINEAR),
            Rule((), "blocks/k/bias", Constant(0.0)),
        ),
        ignored=(Ignore("*.position_ids", "a range, never trained"),),
    )

A placeholder such as `{i}` in the source and not in the target is stacked over layers on axis 0 of
the leaf; one in both is copied. `{3*i+1}` is allowed in a source, for layers that are not numbered
0, 1, 2, …. A table never mentions sizes: they follow from the shapes of the leaves, so the same
table serves every published size.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping

import numpy as np

from perception_jax.errors import ConfigError
from perception_jax.interop.transforms import (
    CONV,
    IDENTITY,
    LINEAR,
    SPLIT_LINEAR,
    Chain,
    Concat,
    Constant,
    Dropped,
    ExtraAxes,
    FoldedPosition,
    Identity,
    Permute,
    Reshape,
    RopePermute,
    Split,
    Transform,
    chain,
)

__all__ = [
    "CONV",
    "IDENTITY",
    "LINEAR",
    "SPLIT_LINEAR",
    "Chain",
    "Concat",
    "Constant",
    "Dropped",
    "ExtraAxes",
    "FoldedPosition",
    "Identity",
    "Ignore",
    "Permute",
    "Rename",
    "Reshape",
    "RopePermute",
    "Rule",
    "RuleTable",
    "Split",
    "Transform",
    "chain",
    "conv",
    "embedding",
    "identity_table",
    "linear",
    "norm",
]

_FIELD = re.compile(r"\{(?:(\d+)\*)?([a-z]\w*)(?:\+(\d+))?\}")


@functools.cache
def placeholders(pattern: str) -> frozenset[str]:
    """Returns the names of the placeholders of a pattern."""
    if re.search(r"[{}]", _FIELD.sub("", pattern)):
        raise ConfigError(
            f"Expected placeholders such as {{i}} or {{3*i+1}} in a name, found {pattern!r}."
        )
    return frozenset(match[2] for match in _FIELD.finditer(pattern))


def fill(pattern: str, values: Mapping[str, int]) -> str:
    """The pattern with numbers in place of its placeholders."""
    return _FIELD.sub(
        lambda match: str(int(match[1] or 1) * values[match[2]] + int(match[3] or 0)), pattern
    )


@functools.cache
def matcher(pattern: str) -> re.Pattern[str]:
    """A regular expression with one group of digits per plain placeholder of a pattern."""
    parts, end, seen = [], 0, set()
    for match in _FIELD.finditer(pattern):
        name = match[2]
        number = f"(?P={name})" if name in seen else rf"(?P<{name}>0|[1-9]\d*)"
        parts += [re.escape(pattern[end : match.start()]), number]
        end = match.end()
        seen.add(name)
    return re.compile("".join([*parts, re.escape(pattern[end:])]))


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


@dataclasses.dataclass(frozen=True)
class Rule:
    """Maps one or more source tensors to one or more leaves, and back.

    Attributes:
      source: source name pattern, several for a transform that joins, `()` for a `Constant`.
      target: path pattern, several for a transform that splits.
      transform: from source to target layout.
      default: value of the leaf where the checkpoint has none of the sources; None: they must be
        there. Exports always write them.
      copies: other names under which the same tensor may be stored (tied weights). One of the
        names is enough; all that are present must be equal. Exports write only `source`.

    Raises:
      ConfigError: the placeholders of source and target do not fit together.
    """

    source: str | tuple[str, ...]
    target: str | tuple[str, ...]
    transform: Transform = IDENTITY
    default: float | None = None
    copies: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.targets:
            raise ConfigError(f"Expected at least one target, found none: {self}.")
        kept = placeholders(self.targets[0])
        for name in self.targets + self.copies:
            if _FIELD.sub(r"{\2}", name) != name:
                raise ConfigError(f"Expected a plain placeholder such as {{i}} in {name!r}.")
        if any(placeholders(target) != kept for target in self.targets):
            raise ConfigError(f"Expected the same placeholders in every target, found {self}.")
        if self.copies and len(self.sources) != 1:
            raise ConfigError(f"Expected one source where copies are named, found {self}.")
        for source in self.sources + self.copies:
            if missing := kept - placeholders(source):
                raise ConfigError(f"Expected {sorted(missing)} in source {source!r} of {self}.")
            if placeholders(source) - kept != set(self.stacked):
                raise ConfigError(f"Expected at most one stacked placeholder, found {self}.")

    @property
    def sources(self) -> tuple[str, ...]:
        return _as_tuple(self.source)

    @property
    def targets(self) -> tuple[str, ...]:
        return _as_tuple(self.target)

    @property
    def stacked(self) -> tuple[str, ...]:
        """The placeholder that runs over the leading axis of the leaves: none or one."""
        if not self.sources:
            return ()
        extra = placeholders(self.sources[0]) - placeholders(self.targets[0])
        return tuple(sorted(extra))[:1]

    def under(self, source: str, target: str) -> Rule:
        """Returns the rule with a prefix before source names and one before paths."""
        return dataclasses.replace(
            self,
            source=tuple(source + name for name in self.sources),
            target=tuple(target + path for path in self.targets),
            copies=tuple(source + name for name in self.copies),
        )


@dataclasses.dataclass(frozen=True)
class Ignore:
    """Source names that the model does not use, with the reason.

    `pattern` is a glob: `*` stands for any characters, dots included.
    """

    pattern: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Rename:
    """An older spelling of source names, replaced before the rules are applied (import only).

    Attributes:
      pattern: regular expression, searched in the part of the name after `under`.
      replacement: as in `re.sub`.
      under: only names that begin so are looked at.
    """

    pattern: str
    replacement: str
    under: str = ""

    def apply(self, name: str) -> str:
        if not name.startswith(self.under):
            return name
        rest = name[len(self.under) :]
        return self.under + re.sub(self.pattern, self.replacement, rest)


DATA_PARALLEL = Rename(r"^module\.", "")
"""Removes the prefix of torch's (Distributed)DataParallel."""


@dataclasses.dataclass(frozen=True)
class RuleTable:
    """All name rules of one checkpoint layout of one model.

    Attributes:
      rules: every leaf is the target of exactly one.
      ignored: names that may be present and are dropped; the key report lists them.
      renames: applied in order to every name of the file.
      buffers: source tensors that hold no parameters and follow from the configuration (e.g.
        Swin's index tables). If present they must equal these; exports write them.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[Ignore, ...] = ()
    renames: tuple[Rename, ...] = (DATA_PARALLEL,)
    buffers: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def under(self, source: str = "", target: str = "") -> RuleTable:
        """Returns the table for this model as a part of a larger one.

        Args:
          source: prefix of source names, e.g. "vision_tower.".
          target: prefix of paths, e.g. "vision/".
        """
        return RuleTable(
            rules=tuple(rule.under(source, target) for rule in self.rules),
            ignored=tuple(Ignore(source + item.pattern, item.reason) for item in self.ignored),
            renames=tuple(
                dataclasses.replace(item, under=source + item.under) for item in self.renames
            ),
            buffers={source + name: value for name, value in self.buffers.items()},
        )

    def part(self, source: str, target: str) -> RuleTable:
        """The inverse of `under`: the rules below the prefixes, with the prefixes removed."""
        return dataclasses.replace(
            self,
            rules=tuple(
                dataclasses.replace(
                    rule,
                    source=tuple(name.removeprefix(source) for name in rule.sources),
                    target=tuple(path.removeprefix(target) for path in rule.targets),
                    copies=tuple(name.removeprefix(source) for name in rule.copies),
                )
                for rule in self.rules
                if all(path.startswith(target) for path in rule.targets)
            ),
        )

    def __add__(self, other: RuleTable) -> RuleTable:
        return RuleTable(
            rules=self.rules + other.rules,
            ignored=self.ignored + other.ignored,
            renames=tuple(dict.fromkeys(self.renames + other.renames)),
            buffers={**self.buffers, **other.buffers},
        )

    def rename(self, name: str) -> str:
        """Converts a source name to the spelling that the rules use."""
        for item in self.renames:
            name = item.apply(name)
        return name

    def ignored_because(self, name: str) -> str | None:
        """Returns why a source name is dropped; None if it is not."""
        reasons = (i.reason for i in self.ignored if fnmatch.fnmatchcase(name, i.pattern))
        return next(reasons, None)

    def original(self, name: str) -> str | None:
        """The source name that `name` is a copy of; None if it is not a copy."""
        for rule in self.rules:
            for copy in rule.copies:
                if match := matcher(copy).fullmatch(name):
                    values = {key: int(value) for key, value in match.groupdict().items()}
                    return fill(rule.sources[0], values)
        return None


def linear(source: str, target: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """`source.weight` [out, in] ↔ `target/kernel` [in, out], and the bias."""
    return (Rule(f"{source}.weight", f"{target}/kernel", LINEAR), *_bias(source, target, bias))


def conv(source: str, target: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """`source.weight` [out, in, h, w] ↔ `target/kernel` [h, w, in, out], and the bias."""
    return (Rule(f"{source}.weight", f"{target}/kernel", CONV), *_bias(source, target, bias))


def norm(source: str, target: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """`source.weight` ↔ `target/scale`, and the bias."""
    return (Rule(f"{source}.weight", f"{target}/scale"), *_bias(source, target, bias))


def embedding(source: str, target: str) -> tuple[Rule, ...]:
    """`source.weight` ↔ `target/embedding`, both [rows, width]."""
    return (Rule(f"{source}.weight", f"{target}/embedding"),)


def _bias(source: str, target: str, bias: bool) -> tuple[Rule, ...]:
    return (Rule(f"{source}.bias", f"{target}/bias"),) if bias else ()


def identity_table(paths: Iterable[str]) -> RuleTable:
    """The table of the layout "jax": every leaf is stored under its path."""
    return RuleTable(rules=tuple(Rule(path, path) for path in paths), renames=())
