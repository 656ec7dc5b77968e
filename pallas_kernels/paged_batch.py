"""The block tables of one step: which sequences it holds, and where their tokens lie in the cache."""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from .kv_cache import KVCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedBatch:
    """What the paged kernels need to know of one step: R sequences, T new tokens, packed without padding.

    Sequence r brings the tokens `query_starts[r] : query_starts[r + 1]` of the packed arrays, its newest ones.
    Decodes (one new token) stand first; then prefills, whole or in chunks; then padding sequences, which have
    context 0 and repeat the last of `query_starts`. Tokens past `query_starts[-1]` are padding too.

    Values are traced where kernels run, and so not checked there: block ids in a table must lie in the cache, and a
    table must reach as far as its context. `check` looks at them.

    Example, two sequences on blocks of 4: one decodes its 6th token, one prefills 3 tokens.

    >>> import jax.numpy as jnp
    >>> batch = PagedBatch(
    ...     block_tables=jnp.array([[7, 2], [5, 0]], jnp.int32),
    ...     context_lens=jnp.array([6, 3], jnp.int32),
    ...     query_starts=jnp.array([0, 1, 4], jnp.int32),
    ...     slot_mapping=jnp.array([2 * 4 + 1, 5 * 4 + 0, 5 * 4 + 1, 5 * 4 + 2], jnp.int32),
    ...     num_decodes=jnp.int32(1),
    ...     max_query_len=3,
    ... )
    """

    block_tables: Int32[Array, "R max_blocks"]
    """The cache's blocks of each sequence, in order; what lies past its context is not read."""
    context_lens: Int32[Array, " R"]
    """Tokens each sequence holds once this step's are written."""
    query_starts: Int32[Array, " R+1"]
    """Where each sequence's new tokens begin; the last entry is the number of real tokens."""
    slot_mapping: Int32[Array, " T"]
    """Where each token's key and value go: block * block_size + offset, or -1 for padding."""
    num_decodes: Int32[Array, ""]
    """So many sequences of one new token stand first."""
    max_query_len: int = field(metadata={"static": True})
    """No sequence brings more new tokens; 1 promises that there are only decodes."""
    shared_prefix_lens: Int32[Array, " R"] | None = None
    """Tokens at the beginning of each decode that lie in the same blocks as its neighbours', to be read once for all.

    Neighbouring decodes of the same positive length and the same first block are a group: the tables of all of them
    must name the same blocks for so many tokens. Whole blocks, and never the sequence's newest token: a multiple of
    block_size below `context_lens`. 0 for what shares nothing, and for all after the decodes; None: nobody shares.

    How a sequence's sum is cut depends on its own shared length too, and so do its output's last bits; on who else is
    in the group, or whether anybody is, they do not.
    """

    def check(self, cache: KVCache) -> None:
        """Raises ValueError for the first value that breaks what is said above of the fields, with where it stands.

        Waits for the arrays and copies them to the host: for tests and while something is wrong, not for every step.
        Not under `jax.jit`, where there are no values.
        """
        tables, context, starts, slots = (
            np.asarray(array) for array in (self.block_tables, self.context_lens, self.query_starts, self.slot_mapping)
        )
        P, num_slots = cache.num_blocks, cache.num_blocks * cache.block_size
        reach = tables.shape[1] * cache.block_size
        in_context = np.arange(tables.shape[1])[None] * cache.block_size < context[:, None]
        queries, decodes, most = np.diff(starts), int(self.num_decodes), self.max_query_len
        real = np.sort(slots[slots >= 0])
        _require(starts[:1] == 0, "query_starts", starts, "start at 0")
        _require(queries >= 0, "query_starts", starts[1:], "never decrease")
        _require(starts <= len(slots), "query_starts", starts, f"end within the {len(slots)} tokens")
        _require(queries <= most, "query_starts", starts[1:], f"give no sequence more than max_query_len = {most}")
        _require(0 <= decodes <= len(queries), "num_decodes", decodes, f"lie in [0, {len(queries)}]")
        _require(queries[:decodes] == 1, "query_starts", starts[1:], f"give one token to each of {decodes} decodes")
        _require(context >= queries, "context_lens", context, f"count the {queries.tolist()} new tokens too")
        _require(context <= reach, "context_lens", context, f"be at most {reach}, where a block table ends")
        _require(~in_context | ((tables >= 0) & (tables < P)), "block_tables", tables, f"lie in [0, {P}) in a context")
        _require((slots >= -1) & (slots < num_slots), "slot_mapping", slots, f"lie in [-1, {num_slots})")
        _require(slots[starts[-1] :] == -1, "slot_mapping", slots[starts[-1] :], "be -1 past the last sequence")
        _require(np.diff(real) > 0, "slot_mapping", real, "name no slot twice")
        if self.shared_prefix_lens is not None:
            self._check_shared(np.asarray(self.shared_prefix_lens), cache.block_size)

    def _check_shared(self, shared: np.ndarray, block_size: int) -> None:
        name, tables, context = "shared_prefix_lens", np.asarray(self.block_tables), np.asarray(self.context_lens)
        decodes = int(self.num_decodes)
        _require(shared >= 0, name, shared, "not be negative")
        _require(shared[decodes:] == 0, name, shared[decodes:], f"be 0 after the {decodes} decodes")
        _require(shared % block_size == 0, name, shared, f"be multiples of the block size {block_size}")
        _require(shared[:decodes] < context[:decodes], name, shared, f"be below the contexts {context.tolist()}")
        grouped = (shared[1:] == shared[:-1]) & (tables[1:, 0] == tables[:-1, 0])
        prefix = np.arange(tables.shape[1])[None] * block_size < shared[1:, None]
        same = ~(grouped[:, None] & prefix) | (tables[1:] == tables[:-1])
        _require(same, "block_tables", tables[1:], "name the blocks of the row before in a shared prefix")


class PrefixGroups(NamedTuple):
    """Of each sequence, the tokens of its shared prefix, 0 for all but decodes, and the rows of its group."""

    lens: Int32[Array, " R"]
    starts: Int32[Array, " R"]
    stops: Int32[Array, " R"]


def prefix_groups(batch: PagedBatch, rows: int) -> PrefixGroups | None:
    """The groups among the first so many sequences, one of its own for each that shares nothing; None: nobody shares.

    >>> batch = PagedBatch(*map(jnp.asarray, ([[7, 2], [7, 3], [5, 0]], [6, 7, 3], [0, 1, 2, 3], [9, 10, 2], 3)),
    ...     max_query_len=1, shared_prefix_lens=jnp.array([4, 4, 0]))
    >>> [x.tolist() for x in prefix_groups(batch, 3)]
    [[4, 4, 0], [0, 0, 2], [2, 2, 3]]
    """
    if batch.shared_prefix_lens is None:
        return None
    row = jnp.arange(rows, dtype=jnp.int32)
    lens = jnp.where(row < batch.num_decodes, batch.shared_prefix_lens[:rows], 0)
    first_block = batch.block_tables[:rows, 0]
    joins = (lens[1:] > 0) & (lens[1:] == lens[:-1]) & (first_block[1:] == first_block[:-1])
    starts = lax.cummax(jnp.where(jnp.pad(joins, (1, 0)), 0, row))
    stops = lax.cummin(jnp.where(jnp.pad(joins, (0, 1)), rows, row + 1), reverse=True)
    return PrefixGroups(lens, starts, stops)


def _require(holds: np.ndarray | bool, name: str, values: np.ndarray | int, expected: str) -> None:
    if not np.all(holds):
        at = np.unravel_index(np.argmin(holds), np.shape(holds))
        where = f" at {[int(i) for i in at]}" if at else ""
        raise ValueError(f"PagedBatch: {name} must {expected}, got {np.asarray(values)[at]}{where}")
