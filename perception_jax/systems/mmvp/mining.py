"""Finds pairs of images that one encoder gives nearly equal embeddings and another does not.

Section 2 of arXiv 2401.06209, all pairs of N images. A block of columns of the similarity matrix is
computed at a time, each device for its slice of the rows; no array holds more of it than a chunk of
rows and a block of columns. The devices only say in which group of rows a column may have a pair;
which pairs these are, and their similarities, is computed from these groups in float64. So the
result does not depend on the devices, their number, or the blocks.

Letters: N images, D width, R rows of a device, C columns of a block, h hits, n pairs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int64, UInt32

from perception_jax.errors import ConfigError, DataError
from perception_jax.evals.ranking import unit_rows
from perception_jax.inference.batches import fetched
from perception_jax.ops.sharding import AXES

GROUP = 32
"""Rows that a device reports together."""
CHUNK = 32 * GROUP
"""Rows of a matrix product: one bit of a word for each group."""
COLUMNS = 2048
"""Columns of a block."""
MARGIN = 1e-5
"""How far float32 similarities may be off. Above it everything is computed again in float64."""
MOST_PAIRS = 10_000_000
"""Pairs above which a search is given up."""

_ROWS_AT_ONCE = 65_536
_HITS_AT_ONCE = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Which pairs are blind: similar for the first encoder, different for the second.

    Attributes:
      above: cosines of the first encoder must be greater.
      below: cosines of the second encoder must be smaller.

    Raises:
      ConfigError: one of them is not in [-1, 1].
    """

    above: float = 0.95
    below: float = 0.6

    def __post_init__(self) -> None:
        for name in ("above", "below"):
            if not -1 <= (value := getattr(self, name)) <= 1:
                raise ConfigError(f"{name}: expected a cosine in [-1, 1], found {value}.")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BlindPairs:
    """Pairs of images.

    Attributes:
      i, j: numbers of the images, i < j.
      first, second: their cosines by each encoder.
      similar: number of pairs that the first encoder finds similar, blind or not.
      lowest: smallest cosine of the second encoder among these; infinite without any.
    """

    i: Int64[np.ndarray, " n"]
    j: Int64[np.ndarray, " n"]
    first: Float32[np.ndarray, " n"]
    second: Float32[np.ndarray, " n"]
    similar: int
    lowest: float

    def __len__(self) -> int:
        return len(self.i)

    @classmethod
    def joined(cls, parts: Sequence[BlindPairs]) -> BlindPairs:
        """All pairs of several blocks, those that the first encoder finds most similar first.

        Equal ones come in the order of the second encoder's cosines, smallest first, then of i, j.
        """
        empty = cls._of(np.zeros((0, 2), np.int64), *np.zeros((2, 0), np.float32), 0, math.inf)
        names = ("i", "j", "first", "second")
        columns = {
            name: np.concatenate([getattr(one, name) for one in (empty, *parts)]) for name in names
        }
        order = np.lexsort((columns["j"], columns["i"], columns["second"], -columns["first"]))
        columns = {name: values[order] for name, values in columns.items()}
        lowest = min((one.lowest for one in parts), default=math.inf)
        return cls(**columns, similar=sum(one.similar for one in parts), lowest=lowest)

    @classmethod
    def _of(
        cls,
        pairs: np.ndarray,
        first: np.ndarray,
        second: np.ndarray,
        similar: int,
        lowest: float,
    ) -> BlindPairs:
        i, j = pairs[:, 0], pairs[:, 1]
        return cls(i=i, j=j, first=first, second=second, similar=similar, lowest=lowest)


class Miner:
    """All-pairs search over the embeddings of two encoders.

    Attributes:
      blocks: the blocks of columns, which can be searched in any order and apart from each other.
    """

    def __init__(
        self,
        first: np.ndarray,
        second: np.ndarray,
        thresholds: Thresholds | None = None,
        *,
        columns: int = COLUMNS,
        mesh: Mesh | None = None,
    ):
        """Places the first encoder's embeddings on the devices.

        Args:
          first, second: [N, D] of any width and dtype, one row for each image. Rows are scaled to
            length 1 in float32.
          columns: at most so many in a block; more need more memory and fewer calls.
          mesh: devices that share the rows; None is one device.

        Raises:
          DataError: no matrices, another number of rows, fewer than two, or a row that is zero or
            not finite.
          ConfigError: fewer than one column.
        """
        if columns < 1:
            raise ConfigError(f"columns: expected at least 1, found {columns}.")
        _check_rows(first, second)
        self.thresholds = thresholds or Thresholds()
        self._first, self._second = (
            _unit(x, f"the {name} embeddings") for x, name in ((first, "first"), (second, "second"))
        )
        count = len(first)
        self._size = _block_size(count, columns)
        self.blocks = tuple(
            slice(start, min(start + self._size, count)) for start in range(0, count, self._size)
        )
        self._mesh, self._devices = mesh, 1 if mesh is None else mesh.size
        self._rows = self._placed(mesh)

    def __call__(self) -> BlindPairs:
        """All pairs. Raises: as of `search`."""
        return BlindPairs.joined(list(self.search(self.blocks)))

    def search(self, blocks: Iterable[slice]) -> Iterator[BlindPairs]:
        """Yields the pairs of each block: those whose larger number is in the block.

        Devices work on a block while the pairs of the one before are computed on the host.

        Raises:
          DataError: more than `MOST_PAIRS` are similar for the first encoder in a block, or blind.
        """
        waiting: list[slice] = []
        total = 0

        def calls() -> Iterator[tuple[Array, int]]:
            for block in blocks:
                waiting.append(block)
                columns = np.zeros((self._size, self._first.shape[1]), np.float32)
                columns[: block.stop - block.start] = self._first[block]
                limit = np.float32(self.thresholds.above - MARGIN)
                hits = _search(self._rows, columns, limit, np.int32(block.stop), mesh=self._mesh)
                yield hits, len(columns)

        for hits, _ in fetched(calls()):
            found = self._pairs(hits, waiting.pop(0))
            total += len(found)
            _check_total(total, "blind")
            yield found

    def _placed(self, mesh: Mesh | None) -> Array:
        """Rows on the devices: row r is on device r modulo their number, so that the pairs above
        the diagonal are the same work for all."""
        count, width = self._first.shape
        rows = _rows_each(count, self._devices)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            device = (index[0].start or 0) // rows
            own = self._first[device :: self._devices]
            return np.concatenate([own, np.zeros((rows - len(own), width), np.float32)])

        shape = (rows * self._devices, width)
        if mesh is None:
            return jnp.asarray(part((slice(0, rows),)))
        sharding = NamedSharding(mesh, PartitionSpec(AXES))
        return jax.make_array_from_callback(shape, sharding, part)

    def _pairs(self, hits: UInt32[np.ndarray, "_ C"], block: slice) -> BlindPairs:
        """The pairs behind the reported groups."""
        hits = hits[:, : block.stop - block.start]
        place, column = np.nonzero(hits)
        octets = hits[place, column].astype("<u4").view(np.uint8).reshape(-1, 4)
        bits = np.unpackbits(octets, axis=1, bitorder="little")
        which, group = np.nonzero(bits)
        place, column = place[which], column[which] + block.start
        device, chunk = np.divmod(place, len(hits) // self._devices)
        start = (chunk * CHUNK + group * GROUP) * self._devices + device
        found, total = [], 0
        for k in range(0, len(start), _HITS_AT_ONCE):
            some = slice(k, k + _HITS_AT_ONCE)
            found.append(self._similar(start[some], column[some]))
            total += len(found[-1][1])
            _check_total(total, "similar")
        pairs = np.concatenate([np.zeros((0, 2), np.int64), *(one for one, _ in found)])
        first = np.concatenate([np.zeros(0, np.float32), *(one for _, one in found)])
        second = _cosines(self._second, pairs)
        blind = second < self.thresholds.below
        lowest = float(second.min(initial=np.inf))
        return BlindPairs._of(pairs[blind], first[blind], second[blind], len(pairs), lowest)

    def _similar(
        self, start: Int64[np.ndarray, " h"], column: Int64[np.ndarray, " h"]
    ) -> tuple[Int64[np.ndarray, "n 2"], Float32[np.ndarray, " n"]]:
        """Pairs that the first encoder finds similar among groups of rows and a column for each."""
        rows = start[:, None] + np.arange(GROUP) * self._devices
        above_diagonal = rows < column[:, None]
        rows = np.where(above_diagonal, rows, 0)
        near = (self._first[rows] @ self._first[column][:, :, None])[..., 0]
        likely = above_diagonal & (near > self.thresholds.above - 2 * MARGIN)
        pairs = np.stack([rows[likely], np.nonzero(likely)[0]], axis=1)
        pairs[:, 1] = column[pairs[:, 1]]
        cosines = _cosines(self._first, pairs)
        similar = cosines > self.thresholds.above
        return pairs[similar], cosines[similar]


def lowered(
    count: int, width: int, *, columns: int = COLUMNS, mesh: Mesh | None = None
) -> jax.stages.Lowered:
    """The program of one block for `count` images, from shapes alone, to compile and inspect."""
    split = whole = None
    if mesh is not None:
        split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((AXES,), ()))
    devices = 1 if mesh is None else mesh.size
    rows = (_rows_each(count, devices) * devices, width)
    block = (_block_size(count, columns), width)
    number = jax.ShapeDtypeStruct((), np.float32, sharding=whole)
    return _search.lower(
        jax.ShapeDtypeStruct(rows, np.float32, sharding=split),
        jax.ShapeDtypeStruct(block, np.float32, sharding=whole),
        number,
        jax.ShapeDtypeStruct((), np.int32, sharding=whole),
        mesh=mesh,
    )


def _block_size(count: int, columns: int) -> int:
    """Equal blocks of at most so many columns, so that none is mostly padding."""
    return -(-count // -(-count // columns))


def _rows_each(count: int, devices: int) -> int:
    """Rows of each device, whole chunks."""
    return -(-count // (CHUNK * devices)) * CHUNK


@functools.partial(jax.jit, static_argnames=("mesh",))
def _search(
    rows: Float32[Array, "R D"],
    columns: Float32[Array, "C D"],
    limit: Float32[Array, ""],
    last: Array,
    *,
    mesh: Mesh | None,
) -> UInt32[Array, "_ C"]:
    """For each chunk of rows and each column a word: which groups of rows have a similar one.

    Chunks whose rows all come after the block's last column are left out.
    """
    devices = 1 if mesh is None else mesh.size

    def on_device(
        rows: Float32[Array, "r D"], columns: Float32[Array, "C D"]
    ) -> UInt32[Array, "_ C"]:
        count = len(rows) // CHUNK
        found = jnp.zeros((count, len(columns)), jnp.uint32)
        if mesh is not None:
            found = jax.lax.pcast(found, AXES, to="varying")

        def chunk(k: Array, found: Array) -> Array:
            some = jax.lax.dynamic_slice_in_dim(rows, k * CHUNK, CHUNK)
            cosines = jnp.matmul(some, columns.T, precision=jax.lax.Precision.HIGHEST)
            most = cosines.reshape(-1, GROUP, len(columns)).max(axis=1)
            places = jnp.arange(len(most), dtype=jnp.uint32)[:, None]
            word = jnp.sum((most > limit).astype(jnp.uint32) << places, axis=0, dtype=jnp.uint32)
            return jax.lax.dynamic_update_index_in_dim(found, word, k, axis=0)

        needed = jnp.minimum(-(-last // (CHUNK * devices)), count)
        return jax.lax.fori_loop(0, needed, chunk, found)

    if mesh is None:
        return on_device(rows, columns)
    whole, split = PartitionSpec(), PartitionSpec(AXES)
    searched = jax.shard_map(on_device, mesh=mesh, in_specs=(split, whole), out_specs=split)
    found = searched(rows, columns)
    return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, whole))


def _cosines(unit: np.ndarray, pairs: Int64[np.ndarray, "n 2"]) -> Float32[np.ndarray, " n"]:
    """Products of pairs of rows, computed in float64 and rounded to float32."""
    found = [np.zeros(0)]
    for start in range(0, len(pairs), _ROWS_AT_ONCE // 8):
        part = pairs[start : start + _ROWS_AT_ONCE // 8]
        one, other = (unit[part[:, k]].astype(np.float64) for k in (0, 1))
        found.append(np.einsum("nd,nd->n", one, other))
    return np.concatenate(found).astype(np.float32)


def _unit(embeddings: np.ndarray, name: str) -> Float32[np.ndarray, "N D"]:
    """Rows scaled to length 1, part by part."""
    found = np.empty(embeddings.shape, np.float32)
    for start in range(0, len(embeddings), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        found[part] = unit_rows(embeddings[part], f"{name} from row {start} on")
    return found


def _check_rows(first: np.ndarray, second: np.ndarray) -> None:
    shapes = f"{first.shape} and {second.shape}"
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second):
        raise DataError(
            "expected two matrices of embeddings with one row for each image, found shapes "
            f"{shapes}: both encoders must have embedded the same images"
        )
    if len(first) < 2 or not first.shape[1] or not second.shape[1]:
        raise DataError(f"expected embeddings of at least two images, found shapes {shapes}.")


def _check_total(total: int, kind: str) -> None:
    if total > MOST_PAIRS:
        raise DataError(
            f"found more than {MOST_PAIRS:,} {kind} pairs: the thresholds let too much through. "
            "Raise that of the first encoder, or lower that of the second."
        )
