"""Adapter files: trained parameters of a method on a frozen backbone, without the backbone.

One safetensors file. Its metadata names the backbone, has the fingerprint of the backbone's weights
(`interop.fingerprint`) and holds the settings that neither names nor shapes tell. Layers of a stack
of inserts are numbered by the block that contains them (`ag_adapters.7.to_q.weight`).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from perception_jax import settings
from perception_jax.errors import CheckpointError
from perception_jax.interop.checkpoint_dir import INDEX, SINGLE
from perception_jax.interop.export import export_params
from perception_jax.interop.fingerprint import fingerprint
from perception_jax.interop.load import load_params
from perception_jax.interop.rules import Rename, Rule, RuleTable
from perception_jax.interop.safetensors_io import SafetensorsFile
from perception_jax.interop.writer import write_file
from perception_jax.settings import Settings, SettingType, shown

BACKBONE, FINGERPRINT = "backbone", "backbone_fingerprint"
"""Metadata keys of the backbone's source and of its fingerprint."""

_INTEGER, _NUMBER = re.compile("[0-9]+"), re.compile(r"[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterNames:
    """Names of all trained parameters in adapter files.

    Attributes:
      rules: between the file's names and our paths; a stack is numbered by `{i}`.
      stack: what the names of the stack of inserts begin with, e.g. "ag_adapters".
      layers: the blocks with an insert, ascending.
    """

    rules: tuple[Rule, ...]
    stack: str
    layers: tuple[int, ...]

    def table(self, renames: Sequence[Rename] = ()) -> RuleTable:
        """Returns the rule table, for files whose names `renames` have changed."""
        # A stack is numbered 0, 1, 2, …: no number is larger than its block's, so that in this
        # order none is renamed twice.
        numbers = (
            Rename(rf"^{self.stack}\.{layer}\.", f"{self.stack}.{k}.")
            for k, layer in enumerate(self.layers)
        )
        return RuleTable(rules=self.rules, renames=(*renames, *numbers))

    def by_block(self, name: str) -> str:
        """A name of the table as written in the file."""
        number = re.compile(rf"^{self.stack}\.(\d+)\.")
        return number.sub(lambda found: f"{self.stack}.{self.layers[int(found[1])]}.", name)


def save_adapters(
    path: str | os.PathLike[str],
    names: AdapterNames,
    leaves: Mapping[str, jax.Array],
    *,
    backbone: str,
    weights: Mapping[str, jax.Array],
    metadata: Mapping[str, str],
    dtype: np.typing.DTypeLike | None = None,
) -> None:
    """Writes an adapter file atomically, replacing an older one of that name.

    Args:
      leaves: all that trains, by path.
      backbone: what it was loaded from. A folder or file of this machine is named relative to the
        adapters' folder, so that both can move together.
      weights: the backbone's leaves by path, for its fingerprint.
      metadata: further strings.
      dtype: of the file; None keeps that of each leaf.

    Raises:
      CheckpointError: the file cannot be written.
    """
    path = pathlib.Path(path)
    if dtype is not None:
        leaves = {name: leaf.astype(dtype) for name, leaf in leaves.items()}
    tensors = [
        dataclasses.replace(tensor, name=names.by_block(tensor.name))
        for tensor in export_params(names.table(), leaves)
    ]
    if backbone and os.path.exists(backbone):
        backbone = os.path.relpath(os.path.realpath(backbone), os.path.realpath(path.parent))
    own = {"format": "pt", BACKBONE: backbone, FINGERPRINT: fingerprint(weights)}
    write_file(path, tensors, {**own, **metadata})


class AdapterFile:
    """An open adapter file.

    Attributes:
      path: of the file.
      shapes: of its tensors, by their names after `renames`.

    Raises:
      CheckpointError: the file is missing or damaged.
    """

    def __init__(
        self, path: str | os.PathLike[str], renames: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Opens an adapter file.

        Args:
          renames: (regular expression, replacement) pairs, applied in order to every name
            of the file before it is read.
        """
        self._file = SafetensorsFile(path)
        self._renames = tuple(Rename(pattern, replacement) for pattern, replacement in renames)
        self.path = self._file.path
        table = RuleTable(rules=(), renames=self._renames)
        self.shapes = {table.rename(name): spec.shape for name, spec in self._file.specs.items()}

    def layers(self, stack: str) -> tuple[int, ...]:
        """The blocks with an insert, ascending.

        Args:
          stack: see `AdapterNames`.

        Raises:
          CheckpointError: there is none, or a block that no tower has.
        """
        number = re.compile(rf"{stack}\.(0|[1-9][0-9]*)\.")
        blocks = sorted({int(found[1]) for name in self.shapes if (found := number.match(name))})
        if not blocks:
            raise CheckpointError(
                f"Expected names such as {stack}.1.to_q.weight in {self.path}, found "
                f"{', '.join(sorted(self.shapes)[:3])}, …: is this a file of such adapters? Other "
                "names can be mapped with `renames`."
            )
        kind = settings.Integer(0, settings.DEPTH.high - 1)
        settings.check(blocks[-1], kind, f"adapters in {self.path}: block", error=CheckpointError)
        return tuple(blocks)

    def setting(self, key: str, kind: SettingType, default: Any) -> Any:
        """A setting in the metadata, which holds strings.

        Args:
          kind: what it may be, see `settings`.
          default: for a file that does not say.

        Raises:
          CheckpointError: it says nonsense.
        """
        where = f"metadata of {self.path}"
        metadata = Settings(self._file.metadata, where, error=CheckpointError)
        text = metadata.get(key, settings.Text(longest=32), None)
        if text is None:
            return default
        value = text
        if isinstance(kind, settings.Integer) and _INTEGER.fullmatch(text):
            value = int(text)
        elif isinstance(kind, settings.Number) and _NUMBER.fullmatch(text):
            value = float(text)
        return settings.check(value, kind, f"{where}: {key}", error=CheckpointError)

    def load(
        self,
        names: AdapterNames,
        abstract: Mapping[str, jax.ShapeDtypeStruct],
        *,
        shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    ) -> dict[str, jax.Array]:
        """Reads all trained parameters by path.

        Args:
          abstract: its shapes by path.
          shardings: where each leaf goes; None puts all on the default device.

        Raises:
          CheckpointError: unknown or missing names, or shapes of another backbone.
        """
        table = names.table(self._renames)
        return load_params(table, self._file, abstract, shardings=shardings).params

    def check_backbone(self, name: str, weights: Mapping[str, jax.Array]) -> None:
        """Compares a backbone with the one that the adapters were made for.

        A file without a fingerprint, from before there were any, passes with a warning in the log.

        Args:
          name: what the backbone was loaded from.
          weights: its leaves by path.

        Raises:
          CheckpointError: it has other weights.
        """
        expected = self.setting(FINGERPRINT, settings.Text(longest=32), "")
        theirs = shown(self._file.metadata.get(BACKBONE, ""))
        found = fingerprint(weights) if expected else ""
        if not expected:
            _log.warning(
                "%s has no fingerprint of its backbone %s: whether %s has the same weights was not "
                "checked. Save the adapters again to add one.",
                self.path,
                theirs,
                shown(name),
            )
        elif found != expected:
            raise CheckpointError(
                f"{self.path}: expected the backbone that these adapters were trained on, {theirs} "
                f"with fingerprint {expected}, found {shown(name)} with fingerprint {found}: "
                "its weights are others. Load the adapters with their own backbone, or train new "
                "ones for this one."
            )


def backbone_of(
    path: str | os.PathLike[str], *, shipped: Sequence[str], trusted: Sequence[str] = ()
) -> str:
    """The backbone that a file of adapters was made for: the one in the same folder, or else the
    one that it names. Relative names start from the file's folder.

    A file may come from anyone, so that nothing is fetched and no folder elsewhere is read because
    it says so.

    Args:
      shipped: names of weights in the package.
      trusted: names that the caller would load: hub ids and folders.

    Raises:
      CheckpointError: it does not say, or names something else than shipped weights, a folder
        below its own, or what is trusted.
    """
    folder = pathlib.Path(path).parent
    if any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return str(folder)
    name = SafetensorsFile(path).metadata.get(BACKBONE, "")
    if not name:
        raise CheckpointError(f"{path} does not name its backbone; give it as `backbone`.")
    if name in shipped or name in trusted:
        return name
    found = _resolved(folder / name)  # also an absolute path, which an older version wrote
    if found is not None and os.path.isdir(found):
        inside = folder.resolve() in found.parents
        if inside or any(found == _resolved(pathlib.Path(one)) for one in trusted):
            return str(folder / name)
    raise CheckpointError(
        f"{path} names the backbone {shown(name)}, which is neither shipped "
        f"({', '.join(shipped)}) nor in its folder; what a file names is not fetched and not "
        "looked for elsewhere. If you trust it, give it as `backbone` (`--backbone` of a program)."
    )


def _resolved(path: pathlib.Path) -> pathlib.Path | None:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):  # names that no file has: NUL, too long, a loop
        return None
