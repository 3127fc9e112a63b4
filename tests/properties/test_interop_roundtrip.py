"""Import is the inverse of export, bit for bit, for every transform, dtype and order of names."""

from __future__ import annotations

import itertools

import jax
import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from perception_jax.interop.binding import source_shapes
from perception_jax.interop.checkpoint_dir import open_checkpoint
from perception_jax.interop.export import export_params
from perception_jax.interop.load import load_params
from perception_jax.interop.rules import (
    CONV,
    IDENTITY,
    LINEAR,
    SPLIT_LINEAR,
    Concat,
    ExtraAxes,
    Permute,
    Reshape,
    RopePermute,
    Rule,
    RuleTable,
    chain,
)
from perception_jax.interop.verify import compare_params
from perception_jax.interop.writer import write_checkpoint

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.int32)
sizes = st.integers(1, 4)


def shapes(rank: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[sizes] * rank)


@st.composite
def one_to_one(draw):
    """How to make a transform of one tensor, and a shape of ours that it fits."""
    heads, theirs = draw(sizes), draw(st.sampled_from(("half", "interleaved")))
    rank = draw(st.integers(0, 4))
    axes = tuple(draw(st.permutations(range(rank))))
    extra = tuple(sorted(draw(st.sets(st.integers(0, rank), max_size=2))))
    shape, width = draw(shapes(rank)), 2 * heads * draw(sizes)
    return draw(
        st.sampled_from(
            [
                (lambda: IDENTITY, shape),
                (lambda: Permute(axes), shape),
                (lambda: ExtraAxes(extra), shape),
                (lambda: Reshape((-1, *shape[1:2])), shape),
                (lambda: CONV, draw(shapes(4))),
                (lambda: LINEAR, draw(shapes(2))),
                (lambda: RopePermute(heads, theirs), (width, *shape[:2])),
                (lambda: chain(RopePermute(heads, theirs), LINEAR), (draw(sizes), width)),
                (lambda: chain(ExtraAxes((2, 3)), LINEAR), draw(shapes(2))),
            ]
        )
    )


@st.composite
def rule_and_leaves(draw, number: int):
    """How to make a rule, and the shapes of its leaves; some stacked, some split or joined."""
    kind = draw(st.sampled_from(("one", "split", "join")))
    depth = draw(st.one_of(st.none(), st.integers(1, 12)))
    layers, suffix = ((), "") if depth is None else ((depth,), ".{i}.w")
    target = f"t{number}"
    if kind == "one":
        transform, shape = draw(one_to_one())
        leaves = {target: layers + shape}
        return lambda: Rule(f"s{number}{suffix}", target, transform()), leaves
    rows, columns = tuple(draw(st.lists(sizes, min_size=2, max_size=3))), draw(sizes)
    if kind == "split":
        leaves = {f"{target}/{k}": (*layers, columns, n) for k, n in enumerate(rows)}
        return lambda: Rule(f"s{number}{suffix}", tuple(leaves), SPLIT_LINEAR), leaves
    sources = tuple(f"s{number}.{k}{suffix}" for k in range(len(rows)))
    leaves = {target: (*layers, columns, sum(rows))}
    return lambda: Rule(sources, target, chain(LINEAR, Concat(rows, axis=1))), leaves


@st.composite
def models(draw):
    """How to make a table, and random parameters for it (any bit pattern, NaNs included).

    Rules are made in the test: their run-time type checks may not run inside a strategy.
    """
    rules, params = [], {}
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    for number in range(draw(st.integers(1, 4))):
        rule, leaves = draw(rule_and_leaves(number))
        dtype = np.dtype(draw(st.sampled_from(DTYPES)))
        rules.append(rule)
        for path, shape in leaves.items():
            raw = rng.bytes(int(np.prod(shape)) * dtype.itemsize)
            params[path] = np.frombuffer(raw, dtype).reshape(shape)
    order = draw(st.permutations(list(params)))
    return rules, {path: params[path] for path in order}


def table_of(rules) -> RuleTable:
    return RuleTable(rules=tuple(rule() for rule in rules))


def abstract_of(params):
    return {p: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for p, leaf in params.items()}


@settings(max_examples=60, deadline=None)
@given(models(), st.randoms())
def test_import_undoes_export_in_any_order(model, random):
    table, params = table_of(model[0]), model[1]
    tensors = list(export_params(table, params))
    shapes = source_shapes(table, {path: leaf.shape for path, leaf in params.items()})
    assert {tensor.name: tensor.spec.shape for tensor in tensors} == shapes
    random.shuffle(tensors)
    files = {tensor.name: tensor.read() for tensor in tensors}
    assert all(files[t.name].shape == t.spec.shape for t in tensors)
    assert all(files[t.name].dtype == t.spec.dtype for t in tensors)
    loaded = load_params(table, files, abstract_of(params))
    assert list(loaded.params) == list(params)
    assert compare_params(params, loaded.params) == len(params)
    again = {tensor.name: tensor.read() for tensor in export_params(table, loaded.params)}
    assert compare_params(files, again) == len(files)


@settings(max_examples=10, deadline=None)
@given(models(), st.integers(1, 200))
def test_through_files_and_shards(tmp_path_factory, model, limit):
    table, params = table_of(model[0]), model[1]
    folder = tmp_path_factory.mktemp("checkpoint") / "m"
    write_checkpoint(folder, export_params(table, params), max_shard_bytes=limit)
    loaded = load_params(table, open_checkpoint(folder), abstract_of(params))
    assert compare_params(params, loaded.params) == len(params)


def quiet(leaf: np.ndarray) -> np.ndarray:
    """The leaf with usual NaNs: signalling ones change where devices cut an array."""
    if leaf.dtype.kind == "i":
        return leaf
    return np.where(np.isnan(leaf), leaf.dtype.type(np.nan), leaf)


@settings(max_examples=20, deadline=None)
@given(models())
def test_any_way_of_placing_gives_the_same_leaves(model):
    table, params = table_of(model[0]), {path: quiet(leaf) for path, leaf in model[1].items()}
    files = {tensor.name: tensor.read() for tensor in export_params(table, params)}
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    axes = itertools.cycle(("a", "b", None))
    places = {}
    for path, leaf in params.items():
        size, axis = dict(mesh.shape), next(axes)
        spec = [axis if axis and n % size[axis] == 0 else None for n in leaf.shape[-1:]]
        spec = [*[None] * (leaf.ndim - 1), *spec] if leaf.ndim else []
        places[path] = jax.NamedSharding(mesh, jax.P(*spec))
    loaded = load_params(table, files, abstract_of(params), shardings=places)
    assert compare_params(params, loaded.params) == len(params)
    again = {tensor.name: tensor.read() for tensor in export_params(table, loaded.params)}
    assert compare_params(files, again) == len(files)
