"""Expands a rule table to single tensors, given the shapes of a model's leaves.

Everything is derived from the leaves: which rules apply, how many layers a stack has, and the name
and shape of each source tensor. So one plan serves import, export, and the question
"does this table cover this model" for sizes whose weights nobody has downloaded.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from perception_jax.errors import CheckpointError
from perception_jax.interop.rules import Rule, RuleTable, fill, matcher, placeholders
from perception_jax.interop.tensors import Shape

_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Binding:
    """A rule with its placeholders filled in.

    Attributes:
      targets: paths of leaves.
      layers: source names, one tuple per layer; a single one where nothing is stacked.
      copies: other names of the one source, per layer.
      stacked: whether the leaves have a leading layer axis.
      target_shapes: of the leaves, without the layer axis.
      source_shapes: of the source tensors.
    """

    rule: Rule
    targets: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    copies: tuple[tuple[str, ...], ...]
    stacked: bool
    target_shapes: tuple[Shape, ...]
    source_shapes: tuple[Shape, ...]

    def sources(self) -> Iterator[tuple[str, Shape]]:
        """Names and shapes of all source tensors."""
        for layer in self.layers:
            yield from zip(layer, self.source_shapes, strict=True)


def bind(table: RuleTable, shapes: Mapping[str, Shape]) -> tuple[Binding, ...]:
    """Applies a table to a model, given the shape of each of its leaves.

    Returns:
      Bindings in the order of the rules; together they cover every leaf exactly once.

    Raises:
      CheckpointError: leaves without a rule or with two, rules that cover only some of their
        targets or do not fit a leaf's shape, source names that two rules claim. All at once.
    """
    problems: list[str] = []
    bindings = [
        binding for rule in table.rules for binding in _bind_rule(rule, shapes, problems.append)
    ]
    problems += _cover_problems(bindings, shapes) + _claim_problems(table, bindings)
    if problems:
        raise CheckpointError(
            "Expected a rule table that covers every leaf exactly once and claims every source "
            "name once; correct the model's params.py:\n" + listing(problems)
        )
    return tuple(bindings)


def source_shapes(table: RuleTable, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Returns the name and shape of every tensor of a complete checkpoint.

    `shapes` are those of the leaves, e.g. of an `nnx.eval_shape` model; see `bind` for errors.
    """
    names = dict(item for binding in bind(table, shapes) for item in binding.sources())
    return names | {name: value.shape for name, value in table.buffers.items()}


def listing(lines: Sequence[str]) -> str:
    """Joins at most a screenful of lines, indented."""
    shown = [f"  {line}" for line in lines[:_SHOWN]]
    rest = len(lines) - len(shown)
    return "\n".join(shown + ([f"  … and {rest} more"] if rest else []))


def _bind_rule(
    rule: Rule, shapes: Mapping[str, Shape], complain: Callable[[str], None]
) -> Iterator[Binding]:
    for values in _matches(rule.targets[0], shapes):
        targets = tuple(fill(target, values) for target in rule.targets)
        if missing := [target for target in targets if target not in shapes]:
            complain(f"{rule.sources} also gives {missing}, which the model does not have")
            continue
        binding = _bind_targets(rule, values, targets, [shapes[t] for t in targets], complain)
        if binding is not None:
            yield binding


def _matches(pattern: str, paths: Iterable[str]) -> Iterator[dict[str, int]]:
    """Values of the pattern's placeholders for every path that it matches."""
    if not placeholders(pattern):
        yield from [{}] if pattern in paths else []
        return
    for path in paths:
        if match := matcher(pattern).fullmatch(path):
            yield {name: int(value) for name, value in match.groupdict().items()}


def _bind_targets(
    rule: Rule,
    values: Mapping[str, int],
    targets: tuple[str, ...],
    shapes: Sequence[Shape],
    complain: Callable[[str], None],
) -> Binding | None:
    depth = 1
    if rule.stacked:
        depths = {shape[:1] for shape in shapes}
        if len(depths) != 1 or () in depths:
            complain(f"{targets} have shapes {list(shapes)}, without a common layer axis")
            return None
        ((depth,),) = depths
        shapes = [shape[1:] for shape in shapes]
    try:
        sources = rule.transform.source_shapes(shapes)
    except ValueError as error:
        complain(f"{rule.transform} does not fit {targets}: {error}")
        return None
    if len(sources) != len(rule.sources):
        complain(f"{rule.transform} makes {len(sources)} tensors of {targets}, not {rule.sources}")
        return None
    numbers = [{**values, **dict.fromkeys(rule.stacked, k)} for k in range(depth)]
    return Binding(
        rule=rule,
        targets=targets,
        layers=tuple(tuple(fill(name, n) for name in rule.sources) for n in numbers),
        copies=tuple(tuple(fill(name, n) for name in rule.copies) for n in numbers),
        stacked=bool(rule.stacked),
        target_shapes=tuple(shapes),
        source_shapes=tuple(sources),
    )


def _cover_problems(bindings: Sequence[Binding], shapes: Mapping[str, Shape]) -> list[str]:
    covered: dict[str, Binding] = {}
    problems = []
    for binding in bindings:
        for path in binding.targets:
            if path in covered:
                sources = covered[path].rule.sources, binding.rule.sources
                problems.append(f"{path} has two rules, from {sources[0]} and from {sources[1]}")
            covered[path] = binding
    return problems + [f"{path} has no rule" for path in shapes if path not in covered]


def _claim_problems(table: RuleTable, bindings: Sequence[Binding]) -> list[str]:
    claimed: dict[str, object] = dict.fromkeys(table.buffers, "a buffer")
    problems = []
    for binding in bindings:
        for name in itertools.chain(*binding.layers, *binding.copies):
            if name in claimed:
                problems.append(f"{name} is claimed by {claimed[name]} and {binding.targets}")
            claimed[name] = binding.targets
    return problems
