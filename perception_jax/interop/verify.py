"""Compares an exported checkpoint with the imported one, bit by bit and by model outputs."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jaxtyping import Shaped

from perception_jax.errors import CheckpointError
from perception_jax.interop.binding import listing
from perception_jax.interop.checkpoint_dir import open_checkpoint
from perception_jax.interop.rules import RuleTable
from perception_jax.interop.tensors import tensor_specs
from perception_jax.interop.transforms import LOSSY
from perception_jax.interop.writer import replacing_folder


@dataclasses.dataclass(frozen=True)
class RoundTrip:
    """The result of a lossless round trip.

    Attributes:
      equal: tensors with the same bits and dtype.
      cast: tensors whose dtype changed as requested and whose bits equal the cast original.
      dropped: names of the source that the export leaves out, as the table says.
      added: names that only the export has (defaults and buffers of the table).
    """

    equal: int
    cast: int
    dropped: tuple[str, ...]
    added: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"round trip: {self.equal} tensors bit-equal, {self.cast} equal after their change of "
            f"dtype, {len(self.dropped)} left out as the table says, {len(self.added)} added"
        )


def verify_roundtrip(
    table: RuleTable,
    source: Mapping[str, np.ndarray],
    exported: Mapping[str, np.ndarray] | str | os.PathLike[str],
) -> RoundTrip:
    """Compares every tensor of an export with the checkpoint it came from.

    Args:
      table: the rules by which the source was imported and exported again.
      source: the original, from `open_checkpoint`.
      exported: the export, or its folder.

    Raises:
      CheckpointError: a tensor is missing, has another shape or other bits; all of them together.
    """
    if not isinstance(exported, Mapping):
        exported = open_checkpoint(exported)
    before, after = tensor_specs(source), tensor_specs(exported)
    names = {table.rename(name): name for name in before}
    problems: list[str] = []
    equal = cast = 0
    dropped = []
    for name, file_name in names.items():
        counterpart = name if name in after else table.original(name)
        if counterpart not in after:
            dropped.append(name)
            continue
        if problem := _difference(source[file_name], exported[counterpart]):
            problems.append(f"{counterpart} {problem}")
        equal += before[file_name].dtype == after[counterpart].dtype
        cast += before[file_name].dtype != after[counterpart].dtype
    problems += [
        f"{name} is missing in the export"
        for name in dropped
        if table.ignored_because(name) is None
    ]
    if problems:
        raise CheckpointError(
            "Expected every tensor of the export to equal the one it came from:\n"
            + listing(sorted(problems))
        )
    return RoundTrip(equal, cast, tuple(dropped), tuple(sorted(after.keys() - names.keys())))


def changed_leaves(
    table: RuleTable, expected: Mapping[str, jax.Array], found: Mapping[str, jax.Array]
) -> tuple[str, ...]:
    """Returns the leaves that a layout cannot store exactly and that changed in a round trip.

    The outputs do not change: e.g. a class token that took up its position.

    Args:
      table: of that layout.
      expected, found: leaves before the export and after the import.
    """
    lossy = {
        path
        for rule in table.rules
        if isinstance(rule.transform, LOSSY)
        for path in rule.targets
        if path in expected and path in found
    }
    return tuple(
        sorted(p for p in lossy if _difference(np.asarray(expected[p]), np.asarray(found[p])))
    )


def compare_params(
    expected: Mapping[str, jax.Array | np.ndarray], found: Mapping[str, jax.Array | np.ndarray]
) -> int:
    """Compares two sets of leaves bit by bit, dtypes included; returns how many there are.

    Raises:
      CheckpointError: leaves are missing, unknown or differ; all of them together.
    """
    problems = [f"{path} is missing" for path in expected.keys() - found.keys()]
    problems += [f"{path} is unknown" for path in found.keys() - expected.keys()]
    for path in expected.keys() & found.keys():
        before, after = np.asarray(expected[path]), np.asarray(found[path])
        if before.dtype != after.dtype:
            problems.append(f"{path} has dtype {after.dtype}, expected {before.dtype}")
        elif problem := _difference(before, after):
            problems.append(f"{path} {problem}")
    if problems:
        raise CheckpointError(
            "Expected the same leaves, bit for bit:\n" + listing(sorted(problems))
        )
    return len(expected)


def compare_outputs(
    name: str,
    first: Shaped[np.ndarray, "*S"],
    second: Shaped[np.ndarray, "*S"],
    *,
    tolerance: float,
) -> float:
    """Largest absolute difference of two outputs of what should be the same model.

    Raises:
      CheckpointError: it exceeds `tolerance`, or either output is not finite.
    """
    difference = float(np.max(np.abs(np.subtract(first, second, dtype=np.float64)), initial=0.0))
    if not difference <= tolerance:
        raise CheckpointError(
            f"Expected {name} of both models to agree to {tolerance}, found a difference of "
            f"{difference}. The weights were read, so look at the configuration: activation, "
            f"epsilon, preprocessing."
        )
    return difference


def export_verified(
    directory: str | os.PathLike[str],
    write: Callable[[pathlib.Path], None],
    outputs: Callable[[pathlib.Path], Mapping[str, Shaped[np.ndarray, "..."]]],
    expected: Mapping[str, Shaped[np.ndarray, "..."]],
    *,
    tolerance: float = 1e-5,
) -> None:
    """Exports a model to a folder, loads it back and compares outputs before it replaces an older
    folder.

    Args:
      directory: the folder; what it held stays if anything fails.
      write: exports the model to an empty folder.
      outputs: loads the model of a folder and computes its outputs on probe inputs, by name.
      expected: the same outputs of the model that is exported.
      tolerance: largest absolute difference allowed.

    Raises:
      CheckpointError: an output is missing, differs by more or is not finite, or the folder cannot
        be written.
    """
    target = pathlib.Path(directory)
    with replacing_folder(target.resolve(), overwrite=True) as folder:
        write(folder)
        found = outputs(folder)
        if found.keys() != expected.keys():
            raise CheckpointError(
                f"{target}: expected the outputs {sorted(expected)} of the exported model, found "
                f"{sorted(found)}."
            )
        for name, value in expected.items():
            worst = float(
                np.max(np.abs(np.subtract(value, found[name], dtype=np.float64)), initial=0.0)
            )
            if not worst <= tolerance:
                raise CheckpointError(
                    f"{target}: expected the exported model to give the same {name} when it is "
                    f"loaded back, found a difference of {worst:.3g}. The export is discarded; the "
                    "checkpoints of the run are intact."
                )


def _difference(before: np.ndarray, after: np.ndarray) -> str:
    """Describes the difference of two tensors; "" if equal up to a requested change of dtype."""
    if before.shape != after.shape:
        return f"has shape {after.shape}, expected {before.shape}"
    bits = np.dtype(f"u{after.dtype.itemsize}")
    cast = before.astype(after.dtype, copy=False)
    different = int(np.count_nonzero(cast.view(bits) != after.view(bits)))
    return f"differs in {different} of {after.size} elements" if different else ""
