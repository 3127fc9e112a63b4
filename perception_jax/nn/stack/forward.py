"""The forward pass of a stack: block steps, inserts, and recorded values.

Letters: L layers, B batch, T tokens, D width, C width of the memory, N heads, Q query rows, K keys,
S recorded states, I recorded inserts with A heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from perception_jax.errors import ConfigError
from perception_jax.nn.attention import AnyMask, KvCache, LayerCache
from perception_jax.nn.rope import Rope
from perception_jax.nn.stack.engine import BLOCK_INPUT, LayerInputs, LayerSlice, Remat, scan
from perception_jax.nn.stack.kinds import InsertGroup, LayerKind, insert_groups, kinds_of, of_kind
from perception_jax.nn.stack.layer import Context, Layer
from perception_jax.nn.stack.stacked import Mixed, Separate, base_of, depth_of
from perception_jax.nn.taps import LayerTap, Taps, layer_indices
from perception_jax.ops.sharding import constrain, constrain_batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StackOutput:
    """Output of a stack; values that were not requested are None.

    Attributes:
      x: output of the last block that ran.
      hidden: recorded hidden states, in layer order.
      attention: recorded attention rows, in layer order.
      cross: recorded rows of cross-attention, in layer order.
      inserts: recorded attention of inserts, in layer order.
      cache: with the keys and values of the new tokens.
      state: after the last block.
      outputs: what the blocks returned besides the tokens, with an axis of layers in front.
    """

    x: Float[Array, "B T D"]
    hidden: Float[Array, "S B T D"] | None = None
    attention: Float[Array, "L B N Q K"] | None = None
    cross: Float[Array, "_ B _ Q _"] | None = None
    inserts: Float[Array, "I B A T _"] | None = None
    cache: KvCache | None = None
    state: Any = None
    outputs: Any = None


def run(
    blocks: nnx.Module,
    x: Float[Array, "B T D"],
    *,
    mask: AnyMask | Mapping[str, AnyMask] = None,
    rope: Rope | Mapping[str, Rope | None] | None = None,
    memory: Float[Array, "B K C"] | None = None,
    memory_mask: AnyMask = None,
    context: Context | None = None,
    taps: Taps | None = None,
    cache: KvCache | None = None,
    inputs: Any = None,
    state: Any = None,
    layout: Sequence[str] | None = None,
    key: Array | None = None,
    drop_path: float = 0.0,
    start: int = 0,
    depth: int | None = None,
    remat: Remat = False,
) -> StackOutput:
    """Runs `depth` blocks (by default all remaining ones) from block `start` on.

    Args:
      blocks: a stacked module from `init`, a `Mixed` or `Inserted` one, or one made by `separate`.
      x: input of the first block that runs.
      mask: which keys a token may attend to; or one for each name in the layout.
      rope: rotary positions of the tokens; or those of each name in the layout.
      memory: tokens for the blocks with cross-attention.
      memory_mask: which of these a token may attend to.
      context: for the inserts; None leaves them out.
      taps: what to record; see `nn.taps`. Layers keep their numbers in a part of a stack; negative
        ones count from its end.
      cache: of all layers of the stack, with the tokens before `x`.
      inputs: a pytree with a leading axis over all layers of the stack; each gets its own part.
      state: a pytree that blocks may read and replace, e.g. boxes that each layer refines.
      layout: a name for each layer of the stack by which it takes mask and rope, e.g. "window" and
        "full"; a `Mixed` stack has its own.
      key: for dropout; what a layer drops depends on it and the layer's number alone. None, for
        evaluation, drops nothing.
      drop_path: probability that the last layer's residual branches are dropped; from 0 in the
        first layer it rises linearly.
      remat: what the backward pass recomputes instead of keeping; see `engine.REMAT`.

    Raises:
      ConfigError: arguments that do not fit the stack or each other.
    """
    taps = taps or Taps()
    stop = depth_of(blocks) if depth is None else start + depth
    base, placed = base_of(blocks), insert_groups(blocks)
    if isinstance(base, Mixed):
        layout = base.layout
    x, context = constrain(x, "batch"), constrain_batch(context)
    shared = _Shared(
        mask=mask,
        rope=rope,
        memory=None if memory is None else constrain(memory, "batch"),
        memory_mask=memory_mask,
        context=context,
        rows=taps.rows,
        placed=placed,
        key=key,
        drop_path=drop_path / max(1, depth_of(blocks) - 1),
    )
    _check(blocks, x, shared, range(start, stop), cache=cache, state=state, layout=layout)
    kinds = kinds_of(placed, layout, start, stop, taps, context)
    apart = any(isinstance(stack, Separate) for stack in _stacks(base).values())
    (x_last, cache, state), recorded = scan(
        shared.run_layer,
        (x, cache, state),
        kinds,
        _layer_inputs(base, placed, taps, inputs),
        start=start,
        remat=remat,
        # No scan where nothing is stacked, or where the carry changes its shape.
        unrolled=lambda kind: apart or kind.widens,
    )
    if start in layer_indices(taps.hidden, stop + 1, start):
        later = [recorded["hidden"]] if "hidden" in recorded else []
        recorded["hidden"] = jnp.concatenate([x[None], *later])
    return StackOutput(
        x=x_last,
        inserts=_inserts_in_order(recorded, kinds),
        cache=None if cache is None else cache.advanced(x.shape[1]),
        state=state,
        **recorded,
    )


@dataclasses.dataclass(frozen=True)
class _Shared:
    """Arguments that all layers share."""

    mask: AnyMask | Mapping[str, AnyMask]
    rope: Rope | Mapping[str, Rope | None] | None
    memory: Array | None
    memory_mask: AnyMask
    context: Context | None
    rows: Array | None
    placed: tuple[InsertGroup, ...]
    key: Array | None
    drop_path: float

    def run_layer(self, carry: tuple, layer: LayerSlice) -> tuple[tuple, dict[str, Any]]:
        """Runs a block with its inserts; returns recorded values by the names of `StackOutput`."""
        x, cache, state = carry
        kind, per_layer = layer.kind, layer.per_layer
        steps = _block(per_layer).steps
        given = self._layer(layer, state)
        wide = not kind.widens
        recorded: dict[str, Any] = {}
        x = checkpoint_name(constrain(x, "batch"), BLOCK_INPUT)
        for position in range(len(steps) + 1):
            for group, place in enumerate(self.placed):
                if not kind.inserts[group] or place.position(len(steps)) != position:
                    continue
                x, wide = x if wide else _widened(x, self.context.repeats), True
                insert = per_layer[f"insert {group}"]
                if kind.tapped_inserts:
                    recorded[f"insert {group}"] = insert.attention(x, self.context.given)
                x = insert(x, self.context.given)
            if position == len(steps):
                break
            at = None if cache is None else LayerCache(stack=cache, layer=layer.index)
            out = steps[position](x, dataclasses.replace(given, cache=at, state=state))
            x = out.x
            cache = cache if out.cache is None else out.cache.stack
            state = state if out.state is None else out.state
            found = {"attention": out.attention, "cross": out.cross, "outputs": out.outputs}
            recorded |= {name: value for name, value in found.items() if value is not None}
        x = constrain(x, "batch")
        if kind.hidden:
            recorded["hidden"] = x
        _check_recorded(kind, recorded)
        return (x, cache, state), recorded

    def _layer(self, layer: LayerSlice, state: Any) -> Layer:
        """Makes the block's inputs, without the cache."""
        kind, dropped = layer.kind, self.key is not None
        probe = layer.per_layer["probes"]
        return Layer(
            index=layer.index,
            mask=of_kind(self.mask, kind, "masks"),
            rope=of_kind(self.rope, kind, "rotary positions"),
            memory=self.memory,
            memory_mask=self.memory_mask,
            tap=LayerTap(rows=self.rows, probe=probe) if kind.attention else None,
            cross_tap=LayerTap(rows=self.rows) if kind.cross else None,
            key=jax.random.fold_in(self.key, layer.index) if dropped else None,
            drop_path=self.drop_path * layer.index if dropped and self.drop_path else 0.0,
            inputs=layer.per_layer["inputs"],
            state=state,
        )


def _stacks(base: nnx.Module) -> dict[str | None, nnx.Module]:
    """The stacks of equal blocks, by kind; None is the kind of the only one."""
    return dict(base.stacks.items()) if isinstance(base, Mixed) else {None: base}


def _layer_inputs(
    base: nnx.Module, placed: Sequence[InsertGroup], taps: Taps, inputs: Any
) -> dict[str, LayerInputs]:
    """Collects the inputs that differ between layers, for `run_layer`."""
    blocks = {
        f"block {name}": LayerInputs(stack, lambda kind, name=name: name in (None, kind.name))
        for name, stack in _stacks(base).items()
    }
    inserts = {
        f"insert {group}": LayerInputs(place.inserts, lambda kind, group=group: kind.inserts[group])
        for group, place in enumerate(placed)
    }
    probes = LayerInputs(taps.probes, lambda kind: kind.attention)
    return {**blocks, **inserts, "probes": probes, "inputs": LayerInputs(inputs)}


def _block(per_layer: Mapping[str, Any]) -> nnx.Module:
    """The `StackBlock` of a layer, which is of one of the kinds."""
    of_kinds = (part for name, part in per_layer.items() if name.startswith("block "))
    return next(block for block in of_kinds if block is not None)


def _widened(x: Float[Array, "B T D"], repeats: int) -> Float[Array, "B_repeats T D"]:
    return constrain(jnp.repeat(constrain(x, "batch"), repeats, axis=0), "batch")


def _inserts_in_order(recorded: dict[str, Any], kinds: Sequence[LayerKind]) -> Array | None:
    """Takes the attention of all groups of inserts out of what is recorded, in layer order."""
    groups = sorted(name for name in recorded if name.startswith("insert "))
    found = [recorded.pop(name) for name in groups]
    if len(found) < 2:
        return found[0] if found else None
    layers = [
        (layer, group)
        for group in (int(name.removeprefix("insert ")) for name in groups)
        for layer, kind in enumerate(kinds)
        if kind.tapped_inserts and kind.inserts[group]
    ]
    order = sorted(range(len(layers)), key=lambda place: layers[place])
    return jnp.concatenate(found)[np.array(order)]


def _check_recorded(kind: LayerKind, recorded: Mapping[str, Any]) -> None:
    for name in ("attention", "cross"):
        if getattr(kind, name) and name not in recorded:
            raise ConfigError(
                f"taps request the {name} of a layer whose block records none: leave the layer out."
            )


def _check(
    blocks: nnx.Module,
    x: Array,
    shared: _Shared,
    layers: range,
    *,
    cache: KvCache | None,
    state: Any,
    layout: Sequence[str] | None,
) -> None:
    """Refuses what would be ignored, or fail later without saying why."""
    depth, base = depth_of(blocks), base_of(blocks)
    if not 0 <= layers.start <= layers.stop <= depth:
        raise ConfigError(
            f"layers {layers.start} to {layers.stop - 1} were requested, but the stack has {depth}."
        )
    if layout is not None and len(layout) != depth:
        raise ConfigError(f"layout: expected {depth} names, one a layer, found {len(layout)}.")
    if cache is not None and (cache.keys.shape[0], cache.keys.shape[1]) != (depth, x.shape[0]):
        raise ConfigError(
            f"cache: expected one of {depth} layers and {x.shape[0]} examples, found "
            f"{cache.keys.shape[0]} and {cache.keys.shape[1]}."
        )
    grows = shared.context is not None and shared.context.repeats > 1
    if grows and (cache is not None or state is not None):
        raise ConfigError("a stack in which the batch grows takes neither a cache nor a state.")
    firsts = (
        stack.layers[0] if isinstance(stack, Separate) else stack
        for stack in _stacks(base).values()
    )
    if shared.memory is not None and not any(block.attends_memory for block in firsts):
        raise ConfigError("a memory was given, but no block of this stack attends to one.")
