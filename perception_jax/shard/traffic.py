"""Bytes that a compiled program moves between devices, loops counted as often as they run.

XLA's text has a loop's body once. Here each collective is multiplied by the trip counts of the
loops around it, and asynchronous ones, which the text has in several pieces, count once. The pieces
are XLA's `all-gather-start` and `-done`, or libtpu's fusions that begin a collective, go on with it
beside other work and end it, each with the collective in its body. A program for several TPU slices
is that of one of them: what goes to the others, its text has as `send`s of buffers to the runtime.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import jax

from perception_jax.shard import program
from perception_jax.shard.program import Result, parse_results

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|true_computation|"
    r"false_computation)=(?P<names>\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"= [su]\d+\[\]\S* constant\((\d+)\)")
_COMPARED = re.compile(
    r"ROOT .* compare\(%(?P<counter>[\w.\-]+), %(?P<bound>[\w.\-]+)\), direction=LT"
)
_INDEX = re.compile(r"get-tuple-element\(.*\), index=(\d+)")
_BEGINS = re.compile(
    r"custom-call\((?P<operands>[^)]*)\).*custom_call_target=\"AsyncCollectiveStart\""
)
_NAME = re.compile(r"%?(?P<name>[\w.\-]+) = ")
_ACROSS = re.compile(
    r" = \((?P<result>\w+\[[\d,]*\]).* send\(.*"
    r'_xla_megascale_transfer_type="(?P<kind>\w+)"'
)
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\S+)? ?\{(?P<over>[^}]*)\}"
)
_BYTES = {"pred": 1, "bf16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind and shape.

    Attributes:
      kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", ….
      result: of one of them, on one device.
      group: devices that take part in each.
      runs: how often each of them runs in the program.
      times: how often all of them together do.
      bytes: that a device sends in all of them inside its slice, in a ring.
      dcn_bytes: that it sends to other slices.
    """

    kind: str
    result: Result
    group: int
    runs: int
    times: int
    bytes: int
    dcn_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class _Call:
    callees: tuple[str, ...]
    times: int


@dataclasses.dataclass
class _Computation:
    name: str
    lines: list[str] = dataclasses.field(default_factory=list)


def traffic(compiled: jax.stages.Compiled, devices: int, slices: int = 1) -> list[Traffic]:
    """Returns the collectives of a program, those that send most first.

    Args:
      devices: of a slice; a collective without groups spans all.
      slices: on which the program runs.
    """
    return parse(program.text(compiled), devices, slices)


def parse(text: str, devices: int, slices: int = 1) -> list[Traffic]:
    """`traffic` of a program's text."""
    computations, entry = _computations(text)
    times = _multiplicities(computations, entry)
    found: dict[tuple[str, Result, int, int], int] = collections.Counter()
    listed = []
    for computation in computations.values():
        runs = times[computation.name]
        for line in computation.lines:
            across = _to_slices(line, runs, slices)
            listed += [] if across is None else [across]
        for line in _begun(computation):
            kind, results = _moved(line)
            if computation.name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            for result in results:  # several that XLA has combined
                found[(kind, result, _group(line, devices), runs)] += 1
    listed += [
        Traffic(
            kind=kind,
            result=result,
            group=group,
            runs=runs,
            times=count * runs,
            bytes=count * runs * once,
        )
        for (kind, result, group, runs), count in found.items()
        if (once := _sent(kind, result, group)) and runs
    ]
    return sorted(listed, key=lambda item: -item.bytes - item.dcn_bytes)


def by_kind(found: Sequence[Traffic]) -> Mapping[str, int]:
    """Sums the bytes of each kind of collective."""
    total: dict[str, int] = collections.Counter()
    for item in found:
        total[item.kind] += item.bytes
    return dict(total)


def nbytes(result: Result) -> int:
    """Size of an array on one device."""
    digits = re.match(r"[fsuc](\d+)", result.dtype)
    width = _BYTES.get(result.dtype) or math.ceil(int(digits[1]) / 8)
    return math.prod(result.shape) * width


def _begun(computation: _Computation) -> Iterator[str]:
    """The lines with collectives that a computation begins."""
    pieces = computation.name.startswith("async_collective_fusion") or any(
        'custom_call_target="AsyncCollective' in line for line in computation.lines
    )
    begun = {
        name.strip().lstrip("%")
        for line in computation.lines
        if (match := _BEGINS.search(line))
        for name in match["operands"].split(",")
    }
    for line in computation.lines:
        results = parse_results(line)
        if not results or not results[0].is_collective or results[0].operation.endswith("-done"):
            continue
        if not pieces or _NAME.search(line)["name"] in begun:
            yield line


def _moved(line: str) -> tuple[str, list[Result]]:
    """Kind and results of a collective."""
    results = parse_results(line)
    operation = results[0].operation
    kind = operation.removesuffix("-start")
    if operation == "collective-permute-start":  # operand, result, and what it waits for
        return kind, results[1:2]
    if operation.endswith("-start") and kind != "all-reduce":
        return kind, results[len(results) // 2 :]  # behind the operands
    return kind, results


def _to_slices(line: str, times: int, slices: int) -> Traffic | None:
    """What a line sends to other slices."""
    found = _ACROSS.search(line)
    if found is None or not times:
        return None
    kind = found["kind"].lower().replace("_", "-")
    (result,) = parse_results(f" %sent = {found['result']} send(")
    # Buffers of one slice, which a ring of slices reduces, or each gives to all others.
    turns = {"all-reduce": 2 * (slices - 1) / slices, "all-gather": slices - 1}.get(kind, 1)
    return Traffic(
        kind=kind,
        result=result,
        group=slices,
        runs=times,
        times=times,
        bytes=0,
        dcn_bytes=int(times * turns * nbytes(result)),
    )


def _sent(kind: str, result: Result, group: int) -> int:
    """Bytes that a device sends in one collective of a ring."""
    size, others = nbytes(result), group - 1
    if kind == "all-reduce":
        return 2 * size * others // group
    if kind == "reduce-scatter":
        # XLA's fused form is an all-reduce of the whole array whose result is cut afterwards.
        return size * others // group if result.operation == "all-reduce" else size * others
    if kind == "collective-permute":
        return size
    return size * others // group


def _group(line: str, devices: int) -> int:
    """Devices of each group of a collective."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return listed[1].count(",") + 1
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=", line)
    if tiled:
        return int(tiled[1].split(",")[-1])
    mesh = _MESH_GROUPS.search(line)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh["axes"]))
        over = re.findall(r"'([^']+)'", mesh["over"])
        return math.prod(int(sizes[axis]) for axis in over)
    return devices


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
    """The computations of a module by name, and the name of its entry."""
    found: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = None if line.startswith(" ") else _COMPUTATION.match(line)
        if head:
            current = found[head["name"]] = _Computation(head["name"])
            entry = head["name"] if head["entry"] else entry
        elif line == "}":  # a kernel's settings may have lines that begin with one
            current = None
        elif current is not None:
            current.lines.append(line)
    return found, entry


def _multiplicities(computations: Mapping[str, _Computation], entry: str) -> Mapping[str, int]:
    """How often each computation runs when the entry runs once."""
    total: dict[str, int] = collections.Counter()
    pending = [(entry, 1)]
    while pending:
        name, times = pending.pop()
        if name not in computations:
            continue
        total[name] += times
        for call in _calls(computations[name], computations):
            pending += [(callee, times * call.times) for callee in call.callees]
    return total


def _calls(computation: _Computation, computations: Mapping[str, _Computation]) -> Iterator[_Call]:
    for line in computation.lines:
        names = tuple(
            name.lstrip("%")
            for match in _CALLED.finditer(line)
            for name in re.split(r",\s*", match["names"].strip("{}"))
        )
        if names:
            yield _Call(names, _trips(line, computations, computation) if " while(" in line else 1)


def _trips(line: str, computations: Mapping[str, _Computation], around: _Computation) -> int:
    """Trip count of a `while` whose counter grows by a constant; 1 if the text does not say.

    Args:
      around: the computation with the `while`.
    """
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    condition, body = (
        computations.get(found[1])
        if (found := re.search(rf"\b{name}=%?([\w.\-]+)", line))
        else None
        for name in ("condition", "body")
    )
    if condition is None or body is None:
        return 1
    compared = next((found for one in condition.lines if (found := _COMPARED.search(one))), None)
    place = compared and _INDEX.search(_definition(condition, compared["counter"]))
    if not place or (bound := _number(condition, compared["bound"])) is None:
        return 1
    first = _element(_definition(around, _operands(line)[0]), int(place[1]))
    root = next((one for one in body.lines if one.lstrip().startswith("ROOT ")), "")
    following = _element(root, int(place[1]))
    start = _number(around, first) or 0
    added = _definition(body, following)
    steps = [_number(body, name) for name in _operands(added)] if " add(" in added else []
    step = next(filter(None, steps), 1)
    return max(-(-(bound - start) // step), 0)


def _element(line: str, index: int) -> str:
    """Name of an element of the tuple that a line makes; "" if it makes none."""
    names = _operands(line) if " tuple(" in line else []
    return names[index] if index < len(names) else ""


def _number(computation: _Computation, name: str) -> int | None:
    """Value of an integer constant, also through copies; None if it is none."""
    line = _definition(computation, name)
    found = _CONSTANT.search(line)
    if " copy(" in line:
        return _number(computation, _operands(line)[0])
    return int(found[1]) if found else None


def _definition(computation: _Computation, name: str) -> str:
    """The line that gives a value its name; "" for none."""
    pattern = re.compile(rf"\s*(ROOT )?%?{re.escape(name)} = ") if name else None
    return next((line for line in computation.lines if pattern and pattern.match(line)), "")


def _operands(line: str) -> list[str]:
    """Names of the operands of a line's operation."""
    found = re.search(r" [\w\-]+\((?P<names>%[^)]*)\)", line)
    names = found["names"] if found else ""
    return [re.sub(r"/\*.*?\*/", "", name).strip().lstrip("%") for name in names.split(",")]
