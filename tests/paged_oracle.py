"""Attention through block tables by a loop over tokens in NumPy, in a cache full of NaN, and the rule to judge by it.

Every block that no sequence owns, and every slot past a sequence's end, holds NaN; the tables' unused entries name
such blocks.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import KVCache, PagedBatch

LAYER = 1  # of two; the other holds NaN alone


class Step:
    """Sequences as (new tokens, context) in a pool three times too large, and what a step over them should give.

    `rows`, `tokens`, `max_blocks` and `num_blocks` pad the shapes, so that many steps share a compiled one.
    `shared` names a group for each sequence and the tokens of the prefix that those of the group have in common.
    """

    def __init__(
        self,
        sequences,
        *,
        block_size=16,
        N=4,
        K=2,
        H=32,
        dtype: Any = np.float32,
        rows=8,
        tokens=160,
        max_context=320,
        num_blocks=None,
        max_query_len=128,
        num_decodes=None,
        shared=None,
        seed=0,
    ):
        rng = np.random.default_rng(seed)
        self.sequences, self.block_size, self.dtype = sequences, block_size, dtype
        self.max_query_len = max_query_len
        counts = [-(-context // block_size) for _, context in sequences]
        max_blocks = -(-max_context // block_size)
        num_blocks = num_blocks or 3 * rows * max_blocks // 2
        assert 3 * sum(counts) <= num_blocks

        def normal(*shape):
            return rng.standard_normal(shape).astype(dtype)

        order = rng.permutation(num_blocks)
        unowned = order[sum(counts) :]
        self.tables = rng.choice(unowned, (rows, max_blocks)).astype(np.int32)
        self.pages = [np.full((2, num_blocks, block_size, K, H), np.nan, dtype) for _ in range(2)]
        self.dense, self.queries, self.shared = [], [], shared
        taken, leaders = 0, {}
        for row, ((new, context), count) in enumerate(zip(sequences, counts, strict=True)):
            self.tables[row, :count] = order[taken : taken + count]
            taken += count
            self.dense.append((normal(context, K, H), normal(context, K, H)))
            self.queries.append((2 * normal(new, N, H)).astype(dtype))
            if shared is not None:
                group, prefix = shared[row]
                leader = leaders.setdefault(group, row)
                self.tables[row, : prefix // block_size] = self.tables[leader, : prefix // block_size]
                for array, common in zip(self.dense[row], self.dense[leader], strict=True):
                    array[:prefix] = common[:prefix]
            for pages, array in zip(self.pages, self.dense[-1], strict=True):
                for position in range(context - new):
                    pages[LAYER, self.tables[row, position // block_size], position % block_size] = array[position]
        self.rows, self.tokens = rows, tokens
        self.num_decodes = num_decodes
        self.blank = normal(tokens, N, H), normal(tokens, K, H)

    def arguments(self, chosen=None, rows=None, tokens=None):
        """query, cache, batch and the new keys and values of the chosen sequences, in their order."""
        chosen = list(range(len(self.sequences))) if chosen is None else list(chosen)
        rows, tokens = rows or self.rows, tokens or self.tokens
        news = [self.sequences[i][0] for i in chosen]
        lens = [self.sequences[i][1] for i in chosen]
        starts = np.full(rows + 1, sum(news), np.int32)
        starts[: len(news) + 1] = np.cumsum([0, *news])
        table = np.resize(self.tables, (rows, self.tables.shape[1]))
        table[: len(chosen)] = self.tables[chosen]
        slots = np.full(tokens, -1, np.int32)
        query, key, value = (array[:tokens].copy() for array in (self.blank[0], self.blank[1], self.blank[1]))
        for place, i in enumerate(chosen):
            new, context = self.sequences[i]
            here = slice(starts[place], starts[place + 1])
            positions = np.arange(context - new, context)
            slots[here] = table[place, positions // self.block_size] * self.block_size + positions % self.block_size
            query[here], key[here], value[here] = self.queries[i], self.dense[i][0][-new:], self.dense[i][1][-new:]
        num_decodes = self.num_decodes
        if num_decodes is None:
            num_decodes = next((place for place, new in enumerate(news) if new != 1), len(news))
        batch = PagedBatch(
            block_tables=jnp.asarray(table),
            context_lens=jnp.asarray(lens + [0] * (rows - len(lens)), jnp.int32),
            query_starts=jnp.asarray(starts),
            slot_mapping=jnp.asarray(slots),
            num_decodes=jnp.int32(num_decodes),
            max_query_len=self.max_query_len,
            shared_prefix_lens=self.shared_lens(chosen, rows),
        )
        cache = KVCache(*(jnp.asarray(pages) for pages in self.pages))
        return jnp.asarray(query), cache, batch, jnp.asarray(key), jnp.asarray(value)

    def shared_lens(self, chosen, rows):
        if self.shared is None:
            return None
        lens = [self.shared[i][1] for i in chosen]
        return jnp.asarray(lens + [0] * (rows - len(lens)), jnp.int32)

    def expected(self, dtype, **options):
        """Token by token; every result is rounded to dtype."""
        return [
            np.stack([attend(query, key, value, dtype, **options) for query, key, value in zip(*each, strict=True)])
            for each in (
                (queries, *([array[: context - new + i + 1] for i in range(new)] for array in dense))
                for (new, context), queries, dense in zip(self.sequences, self.queries, self.dense, strict=True)
            )
        ]


def attend(query, key, value, dtype, *, scale=None, logits_soft_cap=None, left=None):
    """One token [N, H] over all it may see [S, K, H]; with a window, over the last `left` tokens and itself."""

    def rounded(x):
        return x.astype(dtype).astype(x.dtype)

    work = np.float64 if dtype == np.float64 else np.float32
    start = 0 if left is None else max(0, len(key) - 1 - left)
    query, key, value = query.astype(work), key[start:].astype(work), value[start:].astype(work)
    repeats = query.shape[0] // key.shape[1]
    key, value = np.repeat(key, repeats, axis=1), np.repeat(value, repeats, axis=1)
    scale = work(query.shape[1] ** -0.5 if scale is None else scale)
    logits = rounded(rounded(np.einsum("nh,snh->ns", query, key)) * scale)
    if logits_soft_cap is not None:
        logits = rounded(work(logits_soft_cap) * np.tanh(logits / work(logits_soft_cap)))
    weights = rounded(np.exp(logits - logits.max(-1, keepdims=True)))
    probs = rounded(weights / weights.sum(-1, keepdims=True))
    return rounded(np.einsum("ns,snh->nh", probs, value))


def assert_sequences_exact(step, out, *, left=None, name="", **options):
    """Each sequence's output is off the exact one by no more than three times as much as the plain formula in the same
    dtype: by itself, for a short sequence's error would hide behind a long one's."""
    out = np.asarray(out).astype(np.float64)
    ends = np.cumsum([new for new, _ in step.sequences])
    assert not out[ends[-1] if len(ends) else 0 :].any(), "padding tokens give zeros"
    refs, lows = (step.expected(dtype, left=left, **options) for dtype in (np.float64, step.dtype))
    for sequence, end, ref, low in zip(step.sequences, ends, refs, lows, strict=True):
        shifted = ((ref.astype(step.dtype) + step.dtype(0.3)) - step.dtype(0.3)).astype(np.float64)
        rounding = 2 * np.abs(shifted - ref.astype(step.dtype).astype(np.float64)).max()
        allowed = 3 * np.abs(low.astype(np.float64) - ref).max() + rounding + 1e-5
        error = np.abs(out[end - len(ref) : end] - ref).max()
        assert error <= allowed, f"{name}: (new tokens, context) = {sequence}: {error} > {allowed}"
