"""A stack of equal blocks as one module with stacked leaves, run by `lax.scan`.

A prefix of a stack is a slice of its leaves, so computing only the layers needed costs nothing.
Layers that differ in what is recorded, or in what a method put between their two steps, are grouped
into runs of a repeating pattern: each run is one scan. Letters: L layers, B batch, T tokens, D
width, N heads, Q query rows, S recorded states, I recorded inserts with A heads and K tokens to
look at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from perception_jax.errors import ConfigError
from perception_jax.nn.attention import Mask
from perception_jax.nn.rope import Rope
from perception_jax.nn.taps import LayerTap, Taps, layer_indices
from perception_jax.ops.sharding import constrain, constrain_batch

BlockModule = TypeVar("BlockModule", bound=nnx.Module)
Model = TypeVar("Model", bound=nnx.Module)
Stacked = TypeVar("Stacked")

_LONGEST_PATTERN = 4


class Block(Protocol):
    """What a stack runs: `nn.transformer.Block`, or what has its two steps."""

    def attention_step(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Mask | None,
        rope: Rope | None,
        tap: LayerTap | None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B N Q T"] | None]:
        """The first step's output and, if tapped, its attention rows."""

    def mlp_step(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The second step's output."""


class Insert(Protocol):
    """What a method puts between the two steps of a block."""

    def __call__(self, x: Float[Array, "B T D"], given: Any) -> Float[Array, "B T D"]:
        """Tokens to tokens, steered by what the method gave as `Context.given`."""

    def attention(self, x: Float[Array, "B T D"], given: Any) -> Float[Array, "B A T K"]:
        """How much each token takes from each token of what was given."""


class Inserted(nnx.Module):
    """A stack with inserts in some of its layers.

    Takes the place of the stack `base` in a model. Run without a context it is `base`, bit for bit.

    Args:
      base: from `init`.
      inserts: from `init`, one for each of `layers`.
      layers: where they go, ascending.
    """

    def __init__(self, base: nnx.Module, inserts: nnx.Module, layers: tuple[int, ...]):
        self.base = base
        self.inserts = inserts
        self.layers = layers


class Separate(nnx.Module):
    """A stack whose layers have leaves of their own; see `separate`."""

    def __init__(self, layers: Sequence[nnx.Module]):
        self.layers = nnx.List(layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What the inserts of a stack are given.

    Attributes:
      given: for `Insert`, a pytree.
      repeats: rows of `given` an example of the batch, one after the other. What comes before the
        first insert is computed once an example; the batch grows there (static).
    """

    given: Any
    repeats: int = dataclasses.field(default=1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StackOutput:
    """Attributes:
    x: output of the last block that ran.
    hidden: recorded hidden states, in layer order; None if none was asked for.
    attention: recorded attention rows, in layer order; None if none was asked for.
    inserts: recorded attention of inserts, in layer order; None if none was asked for.
    """

    x: Float[Array, "B T D"]
    hidden: Float[Array, "S B T D"] | None = None
    attention: Float[Array, "L B N Q T"] | None = None
    inserts: Float[Array, "I B A T K"] | None = None


def init(make: Callable[[nnx.Rngs], BlockModule], depth: int, *, rngs: nnx.Rngs) -> BlockModule:
    """`depth` blocks as one module whose leaves carry a leading layer axis."""
    keys = jax.random.split(rngs.params(), depth)
    return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)


def residual_gain(depth: int) -> float:
    """What CLIP multiplies the initial weights by that end its 2 × `depth` residual branches.

    The sum of all branches then starts as large as their input (GPT-2, §2.3; in OpenAI's CLIP code
    `proj_std`).
    """
    return (2 * depth) ** -0.5


def depth_of(blocks: nnx.Module) -> int:
    """Number of layers in a stacked module."""
    base = base_of(blocks)
    return len(base.layers) if isinstance(base, Separate) else jax.tree.leaves(base)[0].shape[0]


def base_of(blocks: nnx.Module) -> nnx.Module:
    """The stack without inserts."""
    return blocks.base if isinstance(blocks, Inserted) else blocks


def part(stacked: Stacked, start: int, stop: int) -> Stacked:
    """Layers `start` to `stop` (exclusive) of a pytree with stacked leaves, e.g. of a stack."""
    if isinstance(stacked, Separate):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacked.layers[start:stop])
    return jax.tree.map(lambda leaf: leaf[start:stop], stacked)


def separate(model: Model) -> Model:
    """The same model for fast inference: its stacks (`blocks`) as one module for each layer.

    `run` then goes through the layers without a loop, which spares a copy of each layer's weights
    on CPU and the loop's overhead on GPU; outputs are the same. It takes longer to compile. The
    parameters have other paths, so such a model is neither trained nor exported.
    """
    model = jax.tree.map(lambda leaf: leaf, model)
    for name, child in list(vars(model).items()):
        if name == "blocks":
            setattr(model, name, _separate_stack(child))
        elif isinstance(child, nnx.Module):
            setattr(model, name, separate(child))
    return model


def _separate_stack(blocks: nnx.Module) -> nnx.Module:
    if isinstance(blocks, Separate):
        return blocks
    if isinstance(blocks, Inserted):
        return Inserted(_separate_stack(blocks.base), blocks.inserts, blocks.layers)
    leaves, structure = jax.tree.flatten(blocks)
    layers = zip(*(jnp.unstack(leaf) for leaf in leaves), strict=True)
    return Separate([structure.unflatten(layer) for layer in layers])


def run(
    blocks: nnx.Module,
    x: Float[Array, "B T D"],
    *,
    mask: Mask | None = None,
    rope: Rope | None = None,
    context: Context | None = None,
    taps: Taps | None = None,
    depth: int | None = None,
    remat: bool = False,
) -> StackOutput:
    """Runs the first `depth` blocks (all by default).

    Args:
      blocks: a stacked module from `init`, one with inserts, or one made by `separate`.
      x: input of the first block.
      mask: True where a query may look at a key.
      rope: rotary positions of the tokens.
      context: for the inserts; None leaves them out.
      taps: what to record; see `nn.taps`.
      depth: how many blocks to run; taps count within these.
      remat: recompute activations in the backward pass instead of keeping them.

    Raises:
      ConfigError: a context for a stack without inserts, or taps on what comes before the batch
        grows.
    """
    taps = taps or Taps()
    depth = depth_of(blocks) if depth is None else depth
    x, context = constrain(x, "batch"), constrain_batch(context)
    kinds = _kinds(blocks, depth, taps, context)
    wanted = layer_indices(taps.hidden, depth + 1)
    records = _Records(attention=[], hidden=[x[None]] if 0 in wanted else [], inserts=[])
    shared = _Shared(mask=mask, rope=rope, context=context, rows=taps.rows)
    feeds = _Feeds(
        base=base_of(blocks),
        inserts=blocks.inserts if isinstance(blocks, Inserted) else None,
        probes=taps.probes,
    )
    apart = isinstance(feeds.base, Separate)
    for pattern, start, stop in _single(kinds) if apart else _runs(kinds):
        body = _body(pattern, shared)
        body = jax.checkpoint(body, prevent_cse=False) if remat else body
        layers = feeds.take(kinds, pattern, start, stop)
        if apart or pattern[0].widens:  # no scan: nothing is stacked, or the carry changes shape
            x, recorded = body(x, jax.tree.map(lambda leaf: leaf[0], layers))
            recorded = jax.tree.map(lambda leaf: leaf[None], recorded)
        else:
            x, recorded = jax.lax.scan(body, x, layers)
        records.add(recorded)
    return StackOutput(x=x, **records.joined())


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What is special about a layer."""

    attention: bool = False
    hidden: bool = False
    insert: bool = False
    tapped_insert: bool = False
    widens: bool = False


@dataclasses.dataclass(frozen=True)
class _Shared:
    """What all layers are given."""

    mask: Mask | None
    rope: Rope | None
    context: Context | None
    rows: Int[Array, "*R Q"] | None


@dataclasses.dataclass(frozen=True)
class _Feeds:
    """What each layer has of its own: all stacked, inserts and probes over fewer layers."""

    base: nnx.Module
    inserts: nnx.Module | None
    probes: Float[Array, "L B N Q T"] | None

    def take(
        self, kinds: Sequence[_Kind], pattern: Sequence[_Kind], start: int, stop: int
    ) -> tuple[Any, Any, Any]:
        """Layers `start` to `stop` with the axes [repeats, layers of the pattern] in front."""
        repeats = (stop - start) // len(pattern)

        def group(stacked: Any, has: Callable[[_Kind], bool]) -> Any:
            count = sum(map(has, pattern))
            if stacked is None or count == 0:
                return None
            first = sum(map(has, kinds[:start]))
            chosen = part(stacked, first, first + repeats * count)
            return jax.tree.map(lambda leaf: leaf.reshape(repeats, count, *leaf.shape[1:]), chosen)

        return (
            group(self.base, lambda kind: True),
            group(self.inserts, lambda kind: kind.insert),
            group(self.probes, lambda kind: kind.attention),
        )


@dataclasses.dataclass(frozen=True)
class _Records:
    attention: list
    hidden: list
    inserts: list

    def add(self, recorded: dict[str, list[Array]]) -> None:
        """Takes what one run recorded: for each layer of its pattern [repeats, ...]."""
        for name, layers in recorded.items():
            if layers:
                stacked = jnp.stack(layers, axis=1)
                getattr(self, name).append(stacked.reshape(-1, *stacked.shape[2:]))

    def joined(self) -> dict[str, Array | None]:
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: jnp.concatenate(parts) if parts else None for name, parts in found.items()}


def _body(pattern: Sequence[_Kind], shared: _Shared) -> Callable:
    """One repeat of a pattern of layers."""

    def body(x: Array, layers: tuple[Any, Any, Any]) -> tuple[Array, dict[str, list[Array]]]:
        base, inserts, probes = layers
        recorded: dict[str, list[Array]] = {"attention": [], "hidden": [], "inserts": []}
        inserted = probed = 0
        for j, kind in enumerate(pattern):
            block = _at(base, j)
            x = constrain(x, "batch")
            tap = None
            if kind.attention:
                tap = LayerTap(rows=shared.rows, probe=_at(probes, probed))
                probed += 1
            x, rows = block.attention_step(x, mask=shared.mask, rope=shared.rope, tap=tap)
            recorded["attention"] += [rows] if kind.attention else []
            if kind.insert:
                insert, given = _at(inserts, inserted), shared.context.given
                inserted += 1
                x = _widened(x, shared.context.repeats) if kind.widens else x
                recorded["inserts"] += [insert.attention(x, given)] if kind.tapped_insert else []
                x = insert(x, given)
            x = constrain(block.mlp_step(x), "batch")
            recorded["hidden"] += [x] if kind.hidden else []
        return x, recorded

    return body


def _widened(x: Float[Array, "B T D"], repeats: int) -> Float[Array, "B_repeats T D"]:
    return constrain(jnp.repeat(constrain(x, "batch"), repeats, axis=0), "batch")


def _at(stacked: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def _kinds(
    blocks: nnx.Module, depth: int, taps: Taps, context: Context | None
) -> tuple[_Kind, ...]:
    attention = layer_indices(taps.attention, depth)
    hidden = layer_indices(taps.hidden, depth + 1)
    tapped = layer_indices(taps.inserts, depth)
    placed = blocks.layers if isinstance(blocks, Inserted) else ()
    if context is not None and not placed:
        raise ConfigError(
            "a context was given, but this stack has no inserts that could use it: put adapters "
            "in first, e.g. with systems.give.model.Give."
        )
    steered = placed if context is not None else ()
    if missing := set(tapped) - set(steered):
        raise ConfigError(
            f"taps ask for the inserts of layers {sorted(missing)}; this call uses inserts in "
            f"layers {list(steered)}."
        )
    first = min(steered) if context is not None and context.repeats > 1 else -1
    if first >= depth:
        raise ConfigError(
            f"the first insert is in layer {first}, but only {depth} layers run: the batch never "
            "grows to the context's rows. Run more layers, or give one row an example."
        )
    if first >= 0 and (
        min(attention, default=depth) <= first or min(hidden, default=depth) <= first
    ):
        raise ConfigError(
            f"taps on layers up to {first} record the batch before it grows to its rows there; "
            "record later layers, or repeat the images instead."
        )
    return tuple(
        _Kind(
            attention=layer in attention,
            hidden=layer + 1 in hidden,
            insert=layer in steered,
            tapped_insert=layer in tapped,
            widens=layer == first,
        )
        for layer in range(depth)
    )


def _single(kinds: Sequence[_Kind]) -> Iterator[tuple[tuple[_Kind, ...], int, int]]:
    """Each layer as a run of its own."""
    yield from (((kind,), layer, layer + 1) for layer, kind in enumerate(kinds))


def _runs(kinds: Sequence[_Kind]) -> Iterator[tuple[tuple[_Kind, ...], int, int]]:
    """Runs of a repeating pattern, as (pattern, start, stop): the longest first, then the next."""
    start = 0
    while start < len(kinds):
        pattern, stop = max(
            (_repeated(kinds, start, length) for length in range(1, _LONGEST_PATTERN + 1)),
            key=lambda found: (found[1], -len(found[0])),
        )
        yield pattern, start, stop
        start = stop


def _repeated(kinds: Sequence[_Kind], start: int, length: int) -> tuple[tuple[_Kind, ...], int]:
    """How far the pattern of `length` layers repeats; one that does not repeat ends at `start`."""
    pattern = tuple(kinds[start : start + length])
    stop = start + length
    while kinds[stop : stop + length] == pattern:
        stop += length
    single = length > 1 and stop == start + length
    return pattern, start if single or len(pattern) < length else stop
