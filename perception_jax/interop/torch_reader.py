"""Reads torch checkpoints (`.bin`, `.pth`, `.pt`) without torch and without executing code.

Three containers: the zip archive of `torch.save` since 1.6, the plain stream before it, and
TorchScript archives (OpenAI's CLIP files), of which only the tensors are read. The pickled part
goes through `pickle_data`; the tensors stay in the file and are mapped on access.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import numpy as np

from perception_jax.errors import CheckpointError
from perception_jax.interop.pickle_data import (
    MAX_BYTES,
    Function,
    PickleData,
    ScriptObject,
    Symbol,
    plain_dict,
)
from perception_jax.interop.tensors import (
    DTYPES,
    MAX_NAME,
    MAX_RANK,
    TensorFiles,
    TensorSpec,
    fits_memory,
)
from perception_jax.interop.torch_storage import (
    LegacyStorages,
    Storages,
    ZipStorages,
    check_total,
    open_archive,
    read_entry,
)
from perception_jax.settings import shown

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_NESTING = 3
"""Dicts around a state dict."""
_MAX_VALUES = 200_000
"""Values of dicts or modules looked at; a small file can describe endlessly many."""
_MAX_NAMES = 2**26
"""Characters of all names."""
_CONTAINERS = (dict, list, tuple)
_SECTIONS = ("state_dict", "model", "model_state_dict", "module")
"""Where training scripts put the weights, in order of preference."""

_NAMES = {
    "Float": ("float32", "float", "F32"),
    "Double": ("float64", "double", "F64"),
    "Half": ("float16", "half", "F16"),
    "BFloat16": ("bfloat16", "bfloat16", "BF16"),
    "Long": ("int64", "long", "I64"),
    "Int": ("int32", "int", "I32"),
    "Short": ("int16", "short", "I16"),
    "Char": ("int8", "int8", "I8"),
    "Byte": ("uint8", "uint8", "U8"),
    "Bool": ("bool", "bool", "BOOL"),
}
"""Storage class → dtype, its other name, and the name in `DTYPES`."""


@dataclasses.dataclass(frozen=True)
class StorageRef:
    """A torch storage: `size` elements of `dtype` (bytes where None) under `key`."""

    key: str
    dtype: np.dtype | None
    size: int


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """A tensor as a view of a storage; offset and strides in elements."""

    storage: StorageRef
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to the last one used."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, including repeated elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class TorchFiles(TensorFiles):
    """The tensors of one torch checkpoint."""

    def __init__(self, path: pathlib.Path, refs: Mapping[str, TensorRef], storages: Storages):
        self.path, self._refs, self._storages = path, refs, storages
        for name, ref in refs.items():
            _check_bounds(path, name, ref, storages)
        check_total(path, sum(ref.nbytes for ref in refs.values()))
        self.specs = {name: TensorSpec(ref.shape, ref.dtype) for name, ref in refs.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        ref = self._refs[name]
        item = ref.dtype.itemsize
        flat = self._storages.read(
            ref.storage.key, ref.offset * item, TensorSpec((ref.span,), ref.dtype)
        )
        strides = tuple(stride * item for stride in ref.strides)
        return np.lib.stride_tricks.as_strided(flat, ref.shape, strides, writeable=False)

    def check(self, name: str) -> None:
        self._storages.check(self._refs[name].storage.key)


def open_torch(path: str | os.PathLike[str], *, section: str | None = None) -> TorchFiles:
    """Opens a file made by `torch.save` or `torch.jit.save`.

    Args:
      section: dotted name of the dict that holds the weights (e.g. "teacher"); None finds it.

    Raises:
      CheckpointError: the file is damaged, holds anything but tensors and plain values (nothing of
        it is run), holds no state dict, or several and `section` does not choose.
    """
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            value, storages = _read_zip(path) if is_zip else _read_legacy(path, file)
    except OSError as error:
        raise CheckpointError(f"Expected a readable file at {path}: {error}.") from error
    return TorchFiles(path, _find_tensors(path, value, section), storages)


def _read_zip(path: pathlib.Path) -> tuple[Any, Storages]:
    with open_archive(path) as archive:
        names = [info.filename for info in archive.infolist()]
        pickles = [n for n in names if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(
                f"Expected one data.pkl in the archive {path}, found {shown(pickles)}: this zip "
                f"file was not made by torch."
            )
        if len(set(names)) != len(names):
            raise CheckpointError(f"Expected each entry once in the archive {path}.")
        prefix = pickles[0].removesuffix("data.pkl")
        order = prefix + "byteorder"
        if order in names and read_entry(path, archive, order, 16) != b"little":
            raise CheckpointError(f"Expected little-endian tensors in {path}.")
        limit = min(MAX_BYTES, 2**20 + 16 * path.stat().st_size)
        # Reading it whole compares its checksum.
        raw = read_entry(path, archive, pickles[0], limit)
        value = _pickle(path, {}).read(io.BytesIO(raw))
        return value, ZipStorages(path, archive.infolist(), prefix + "data/")


def _read_legacy(path: pathlib.Path, file: io.BufferedIOBase) -> tuple[Any, Storages]:
    if file.read(1) != b"\x80":
        raise CheckpointError(
            f"Expected a file of torch.save in {path}, found another format (a tar archive of "
            f"torch before 0.1.10, a Git LFS pointer or a web page?)."
        )
    file.seek(0)
    dtypes: dict[str, np.dtype | None] = {}
    magic, protocol, system = (_pickle(path, dtypes).read(file) for _ in range(3))
    if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
        raise CheckpointError(
            f"Expected the marks of torch.save at the start of {path}, found other values."
        )
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"Expected little-endian tensors in {path}.")
    value = _pickle(path, dtypes).read(file)
    keys = _pickle(path, dtypes).read(file)
    return value, LegacyStorages(path, file, keys, dtypes)


def _pickle(path: pathlib.Path, dtypes: dict[str, np.dtype | None]) -> PickleData:
    """A reader that notes the dtype of every storage it meets."""

    def storage(value: Any) -> StorageRef:
        kind, symbol, key, _, size, *view = value
        if kind != "storage" or any(item is not None for item in view):
            raise ValueError("a persistent id that is not a whole storage")
        ref = StorageRef(_text(key), _STORAGES[_symbol(symbol)], _size(size))
        dtypes[ref.key] = ref.dtype
        return ref

    return PickleData(str(path), _KNOWN, storage)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorRef:
    return _tensor(storage, None, offset, shape, strides)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any
) -> TensorRef:
    _, _, dtype, *_ = rest
    return _tensor(storage, _DTYPES[_symbol(dtype)], offset, shape, strides)


def _rebuild_parameter(data: TensorRef, *_: Any) -> TensorRef:
    if not isinstance(data, TensorRef):
        raise ValueError(f"a parameter made of a {type(data).__name__}")
    return data


def _tensor(
    storage: Any, dtype: np.dtype | None, offset: Any, shape: Any, strides: Any
) -> TensorRef:
    if not isinstance(storage, StorageRef) or not len(shape) == len(strides) <= MAX_RANK:
        raise ValueError("a tensor without a storage, or with other strides than axes")
    dtype = storage.dtype if dtype is None else dtype
    if dtype is None:
        raise ValueError("a tensor of an untyped storage without a dtype")
    return TensorRef(
        storage, dtype, _size(offset), tuple(map(_size, shape)), tuple(map(_size, strides))
    )


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"a {type(value).__name__} where a string was expected")


def _symbol(value: Any) -> Symbol:
    if isinstance(value, Symbol):
        return value
    raise ValueError(f"a {type(value).__name__} where a dtype was expected")


def _size(value: Any) -> int:
    if type(value) is int and 0 <= value < 2**48:
        return value
    raise ValueError(f"a {type(value).__name__} where a size was expected")


def _check_bounds(path: pathlib.Path, name: str, ref: TensorRef, storages: Storages) -> None:
    storage = ref.storage
    needed = (ref.offset + ref.span) * ref.dtype.itemsize
    announced = storage.size * (1 if storage.dtype is None else storage.dtype.itemsize)
    found = storages.nbytes(storage.key)
    if found is None or max(needed, announced) > found:
        raise CheckpointError(
            f"Expected {max(needed, announced)} bytes of storage {shown(storage.key)} for "
            f"{shown(name)} in {path}, found {found}: the file is truncated or damaged. Copy it "
            f"again."
        )
    if not fits_memory(ref.shape):
        raise CheckpointError(
            f"Expected a shape that fits memory for {shown(name)} in {path}, found "
            f"{shown(ref.shape)}."
        )


def _find_tensors(path: pathlib.Path, value: Any, section: str | None) -> dict[str, TensorRef]:
    """The tensors of the state dict, by name."""
    if isinstance(value, ScriptObject):
        return _script_tensors(path, value)
    named, numbered = _state_dicts(path, value)
    found = numbered | named if section is not None else named or numbered
    if section is None:
        preferred = [name for name in (*_SECTIONS, "") if name in found]
        section = (preferred or [*found])[0] if preferred or len(found) == 1 else None
    if section not in found:
        raise CheckpointError(
            f"Expected one dict of tensors in {path}, found {sorted(found)[:8] or 'none'}. Name "
            f"the one to read as `section`."
        )
    return found[section]


def _state_dicts(
    path: pathlib.Path, value: Any
) -> tuple[dict[str, dict[str, TensorRef]], dict[str, dict[str, TensorRef]]]:
    """Dotted name and tensors of every dict that holds some under names; and of every list, tuple
    and dict that holds them under numbers only, which come second."""
    named: dict[str, dict[str, TensorRef]] = {}
    numbered: dict[str, dict[str, TensorRef]] = {}
    walk = _Walk(path)
    pending = [("", value, 0)] if isinstance(value, _CONTAINERS) else []
    while pending:
        prefix, item, depth = pending.pop()
        entries = walk.entries(item)
        direct = (key for key, inner in entries if isinstance(inner, TensorRef))
        if tensors := _flat(walk, entries):
            has_names = any(type(key) is str for key in direct)
            walk.add(named if has_names else numbered, prefix, tensors)
        if depth < _MAX_NESTING:
            inside = [(key, inner) for key, inner in entries if not isinstance(inner, TensorRef)]
            pending += [(walk.name(prefix, key), inner, depth + 1) for key, inner in inside]
    return named, numbered


def _flat(walk: _Walk, entries: Sequence[tuple[Any, Any]]) -> dict[str, TensorRef]:
    """The tensors among entries, and those in lists, tuples and numbered dicts among them; other
    dicts are state dicts of their own."""
    tensors: dict[str, TensorRef] = {}
    pending = [("", key, value) for key, value in entries if not _is_named(value)]
    while pending:
        prefix, key, value = pending.pop()
        name = walk.name(prefix, key)
        if isinstance(value, TensorRef):
            walk.add(tensors, name, value)
        else:
            pending += [(name, inner_key, inner) for inner_key, inner in walk.entries(value)]
    return dict(reversed(tensors.items()))


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and any(type(key) is not int for key in value)


def _script_tensors(path: pathlib.Path, root: ScriptObject) -> dict[str, TensorRef]:
    """Parameters and buffers of a scripted module, named as its state dict names them."""
    tensors: dict[str, TensorRef] = {}
    walk = _Walk(path)
    pending = [("", root)]
    while pending:
        prefix, module = pending.pop()
        walk.enter(module.attributes)
        for key, value in module.attributes.items():
            if isinstance(value, TensorRef):
                walk.add(tensors, walk.name(prefix, key), value)
            elif isinstance(value, ScriptObject):
                pending.append((walk.name(prefix, key), value))
    return tensors


class _Walk:
    """Counts what is looked at and named: values may hold themselves, or each other many times."""

    def __init__(self, path: pathlib.Path):
        self._path, self._values, self._characters = path, 0, 0
        self._entries: dict[int, list[tuple[Any, Any]]] = {}

    def entries(self, container: dict | list | tuple) -> list[tuple[Any, Any]]:
        """Keys or positions of the tensors and containers in a container."""
        if id(container) not in self._entries:
            items = container.items() if isinstance(container, dict) else enumerate(container)
            kinds = (TensorRef, *_CONTAINERS)
            self._entries[id(container)] = [
                (key, value)
                for key, value in items
                if isinstance(value, kinds) and type(key) in (str, int)
            ]
        found = self._entries[id(container)]
        self.enter(found)
        return found

    def enter(self, container: Sized) -> None:
        self._values += len(container)
        if self._values > _MAX_VALUES:
            raise CheckpointError(
                f"Expected at most {_MAX_VALUES} nested values in {self._path}, found more."
            )

    def name(self, prefix: str, key: Any) -> str:
        """The dotted name of a value in a container called `prefix`."""
        name = f"{prefix}.{key}" if prefix else str(key)
        self._characters += len(name)
        if len(name) > MAX_NAME or self._characters > _MAX_NAMES:
            raise CheckpointError(
                f"Expected names of at most {MAX_NAME} characters, {_MAX_NAMES} in all, in "
                f"{self._path}, found {shown(name)}."
            )
        return name

    def add(self, found: dict[str, Any], name: str, value: Any) -> None:
        if name in found:
            raise CheckpointError(
                f"Expected one value for each name in {self._path}, found two for {name!r}."
            )
        found[name] = value


def _sizes(values: Any = ()) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or len(values) > MAX_RANK:
        raise ValueError("a torch.Size that is no short list")
    return tuple(map(_size, values))


def _device(*names: Any) -> str:
    if not all(isinstance(name, str | int) for name in names):
        raise ValueError("a device that is no name")
    return ":".join(map(str, names))


def _plain_list(items: list) -> list:
    return items


def _default_dict(factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    """A `defaultdict`; what it would make for missing keys is never called."""
    if not (factory is None or isinstance(factory, Symbol | Function)):
        raise ValueError(f"a defaultdict of a {type(factory).__name__}")
    return _counted(items)


def _counted(items: Any = ()) -> dict[Any, Any]:
    return plain_dict(items.items() if isinstance(items, dict) else items)


_STORAGES: dict[Symbol, np.dtype | None] = {
    Symbol(f"torch.{kind}Storage"): DTYPES[ours] for kind, (_, _, ours) in _NAMES.items()
} | {
    Symbol("torch.storage.UntypedStorage"): None,
    Symbol("torch.UntypedStorage"): None,
}
_DTYPES: dict[Symbol, np.dtype] = {
    Symbol(f"torch.{name}"): DTYPES[ours]
    for first, second, ours in _NAMES.values()
    for name in (first, second)
} | {
    Symbol("torch.float8_e4m3fn"): DTYPES["F8_E4M3"],
    Symbol("torch.float8_e5m2"): DTYPES["F8_E5M2"],
    Symbol("torch.uint16"): DTYPES["U16"],
    Symbol("torch.uint32"): DTYPES["U32"],
    Symbol("torch.uint64"): DTYPES["U64"],
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": plain_dict,
    "collections.defaultdict": _default_dict,
    "collections.Counter": _counted,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.Size": _sizes,
    "torch.device": _device,
    "torch.jit._pickle.build_intlist": _plain_list,
    "torch.jit._pickle.build_doublelist": _plain_list,
    "torch.jit._pickle.build_boollist": _plain_list,
    "torch.jit._pickle.build_tensorlist": _plain_list,
}
_FACTORIES = [
    Symbol(f"{module}.{name}")
    for module in ("builtins", "__builtin__")
    for name in ("bool", "dict", "float", "int", "list", "set", "str", "tuple")
]
"""Types that a `defaultdict` names; they are passed on and never called."""
_KNOWN: dict[str, Symbol | Function] = {
    **{symbol.name: symbol for symbol in _FACTORIES},
    **{symbol.name: symbol for symbol in (*_STORAGES, *_DTYPES)},
    **{name: Function(name, make) for name, make in _FUNCTIONS.items()},
}
