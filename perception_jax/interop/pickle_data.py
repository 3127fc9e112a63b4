"""A reader of pickled data: an interpreter for the subset of pickle that describes tensors.

Python's own unpickler imports whatever a file names and calls it. This one never imports and never
calls anything from outside: a global name in the file is looked up in a table of inert stand-ins,
and a name that is not there is an error at once. Instructions come from `pickletools`, which only
parses. Objects of TorchScript archives become `ScriptObject`s: attributes without behaviour.

A few bytes of pickle can describe endless work: values that hold themselves, copies of copies,
numbers of a million digits. So instructions and all that they copy are counted, and nothing is
turned into text, hashed or compared that is not a plain string or number.
"""

from __future__ import annotations

import dataclasses
import io
import pickletools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from perception_jax.errors import CheckpointError
from perception_jax.settings import shown

SCRIPT_PREFIX = "__torch__"
"""Module prefix of TorchScript classes."""
MAX_BYTES = 64 * 2**20
"""Largest pickle in bytes; that of a large model takes 1 MB."""
_MAX_STEPS = 2_000_000
"""Instructions, of which a tensor takes about 40, and values that calls copy."""
_COPY = 8
"""Steps that copying a value counts for; it takes more memory than most instructions."""
_MAX_MEMO = 2**32
_MAX_KEY = 2**60
"""Larger integers have the hash of a smaller one, so that a dict of them takes quadratic time."""
_MARK = object()


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A global that is only passed on, e.g. a dtype or a storage class."""

    name: str


@dataclasses.dataclass(frozen=True)
class Function:
    """A global that may be applied to arguments; `make` builds plain data."""

    name: str
    make: Callable[..., Any]


@dataclasses.dataclass
class ScriptObject:
    """An object of a TorchScript archive; the code of its class is never read."""

    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class _Window:
    """The next bytes of a file: a length that it claims allocates no more than there may be."""

    def __init__(self, file: io.BufferedIOBase):
        self._file, self._left = file, MAX_BYTES

    def read(self, size: int) -> bytes:
        return self._took(self._file.read(min(size, self._left)))

    def readline(self) -> bytes:
        return self._took(self._file.readline(self._left))

    def _took(self, raw: bytes) -> bytes:
        self._left -= len(raw)
        return raw


class PickleData:
    """Reads a pickle as data.

    Args:
      where: the file, for messages.
      known: "module.name" → what stands for it.
      persistent: turns a persistent id (torch: a storage) into data.
    """

    def __init__(
        self,
        where: str,
        known: Mapping[str, Symbol | Function],
        persistent: Callable[[Any], Any],
    ):
        self._where, self._known, self._persistent = where, known, persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._steps = 0

    def read(self, file: io.BufferedIOBase) -> Any:
        """The pickled value; the file is left after it.

        Raises:
          CheckpointError: the pickle names something that is not tensor data, uses an instruction
            that none of torch's files needs, is too long, or is damaged.
        """
        try:
            for opcode, argument, _ in pickletools.genops(_Window(file)):
                if opcode.name == "STOP":
                    return self._pop()
                self._count(1)
                self._run(opcode.name, argument)
        except CheckpointError:
            raise
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"Expected a well-formed pickle in {self._where}: {error!r:.200}. The file is "
                f"damaged or not made by torch.save."
            ) from error
        raise CheckpointError(f"Expected the end of the pickle in {self._where}: truncated.")

    def _run(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self._push(argument)
        elif name in _CONSTANTS:
            self._push(_CONSTANTS[name]())
        elif name in _MEMO_READS:
            self._push(self._memo[int(argument)])
        elif name in _MEMO_WRITES:
            index = len(self._memo) if argument is None else int(argument)
            if not 0 <= index < _MAX_MEMO:
                raise ValueError("a place in the memo that no pickle needs")
            self._memo[index] = self._top()
        elif method := _METHODS.get(name):
            method(self, argument)
        elif name not in _NOTHING:
            raise self._refused(f"the pickle instruction {name}")

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MAX_STEPS:
            raise CheckpointError(
                f"Expected a pickle of at most {_MAX_STEPS} steps in {self._where}, found more: "
                "it describes far more than the tensors of a model."
            )

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value was expected")
        return value

    def _pop_to_mark(self) -> list[Any]:
        start = self._marks.pop()
        values = self._stack[start + 1 :]
        del self._stack[start:]
        return values

    def _mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))
        self._push(_MARK)

    def _pop_top(self, _: Any) -> None:
        if self._stack.pop() is _MARK:
            self._marks.pop()

    def _duplicate(self, _: Any) -> None:
        self._push(self._top())

    def _tuple_to_mark(self, _: Any) -> None:
        self._push(tuple(self._pop_to_mark()))

    def _list_to_mark(self, _: Any) -> None:
        self._push(self._pop_to_mark())

    def _dict_to_mark(self, _: Any) -> None:
        items = self._pop_to_mark()
        self._push(plain_dict(zip(items[::2], items[1::2], strict=True)))

    def _short_tuple(self, size: int) -> None:
        values = [self._pop() for _ in range(size)]
        self._push(tuple(reversed(values)))

    def _append(self, _: Any) -> None:
        value = self._pop()
        self._top_of(list).append(value)

    def _appends(self, _: Any) -> None:
        values = self._pop_to_mark()
        self._top_of(list).extend(values)

    def _set_item(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._top_of(dict).update(plain_dict([(key, value)]))

    def _set_items(self, _: Any) -> None:
        items = self._pop_to_mark()
        self._top_of(dict).update(plain_dict(zip(items[::2], items[1::2], strict=True)))

    def _top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise ValueError("a mark where a value was expected")
        return self._stack[-1]

    def _top_of(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise ValueError(f"expected a {kind.__name__}, found a {type(self._stack[-1])}")
        return self._stack[-1]

    def _global(self, argument: str) -> None:
        module, name = argument.split(" ", 1)
        self._push(self._look_up(f"{module}.{name}"))

    def _stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global whose name is no string")
        self._push(self._look_up(f"{module}.{name}"))

    def _look_up(self, name: str) -> Symbol | Function:
        if name.startswith(SCRIPT_PREFIX + "."):
            return Function(name, lambda *_: ScriptObject())
        if name not in self._known:
            raise self._refused(f"the global {name:.200}")
        return self._known[name]

    def _apply(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Function) or not isinstance(arguments, tuple):
            raise self._refused(f"a call of something that is a {type(function).__name__}")
        sized = (item for item in arguments if isinstance(item, str | list | tuple | dict))
        self._count(_COPY * (len(arguments) + sum(map(len, sized))))
        self._push(function.make(*arguments))

    def _build(self, _: Any) -> None:
        state, value = self._pop(), self._stack[-1]
        if isinstance(value, ScriptObject) and isinstance(state, dict):
            value.attributes = state
        elif not isinstance(value, dict):
            # An ordered dict's own attributes (torch's `_metadata`) are of no use here.
            raise self._refused(f"a state for a {type(value).__name__}")

    def _persistent_id(self, argument: Any) -> None:
        self._push(self._persistent(self._pop() if argument is None else argument))

    def _refused(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"Expected nothing but tensors in {self._where}, found {what}. Nothing of the file was "
            f"run. If you trust it, load it in torch and save its state dict as safetensors."
        )


def plain_dict(items: Iterable[Any] = ()) -> dict[Any, Any]:
    """A dict of (key, value) pairs whose keys are plain: hashing a deep tuple can crash."""
    result = {}
    for key, value in items:
        if not isinstance(key, str | int | float | bytes | None):
            raise TypeError(f"a dict key of type {type(key).__name__}")
        if isinstance(key, int) and not -_MAX_KEY < key < _MAX_KEY:
            raise ValueError(f"the dict key {shown(key)}")
        result[key] = value
    return result


# fmt: off
_LITERALS = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
))
# fmt: on
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_MEMO_READS = frozenset(("GET", "BINGET", "LONG_BINGET"))
_MEMO_WRITES = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
_NOTHING = frozenset(("PROTO", "FRAME"))
_METHODS: dict[str, Callable[[PickleData, Any], None]] = {
    "MARK": PickleData._mark,
    "POP": PickleData._pop_top,
    "POP_MARK": lambda self, _: self._pop_to_mark() and None,
    "DUP": PickleData._duplicate,
    "TUPLE": PickleData._tuple_to_mark,
    "TUPLE1": lambda self, _: self._short_tuple(1),
    "TUPLE2": lambda self, _: self._short_tuple(2),
    "TUPLE3": lambda self, _: self._short_tuple(3),
    "LIST": PickleData._list_to_mark,
    "DICT": PickleData._dict_to_mark,
    "APPEND": PickleData._append,
    "APPENDS": PickleData._appends,
    "SETITEM": PickleData._set_item,
    "SETITEMS": PickleData._set_items,
    "GLOBAL": PickleData._global,
    "STACK_GLOBAL": PickleData._stack_global,
    "REDUCE": PickleData._apply,
    "NEWOBJ": PickleData._apply,
    "BUILD": PickleData._build,
    "PERSID": PickleData._persistent_id,
    "BINPERSID": PickleData._persistent_id,
}
