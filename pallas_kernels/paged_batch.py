"""The block tables of one step: which sequences it holds, and where their tokens lie in the cache."""

from dataclasses import dataclass, field

import jax
from jaxtyping import Array, Int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedBatch:
    """What the paged kernels need to know of one step: R sequences, T new tokens, packed without padding.

    Sequence r brings the tokens `query_starts[r] : query_starts[r + 1]` of the packed arrays, its newest ones.
    Decodes (one new token) stand first; then prefills, whole or in chunks; then padding sequences, which have
    context 0 and repeat the last of `query_starts`. Tokens past `query_starts[-1]` are padding too.

    The values are not checked, since they are traced: block ids in a table must lie in the cache, and a table
    must reach as far as its context.

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
