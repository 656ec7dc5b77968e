"""Tile ranges against the score matrix written out."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMask
from pallas_kernels.tiles import block_tiles, list_tiles, segment_tiles, tile_range, transposed


def band(T, S, lower, upper):
    difference = np.arange(S)[None] - np.arange(T)[:, None]
    visible = np.ones((T, S), bool)
    if lower is not None:
        visible &= difference >= lower
    if upper is not None:
        visible &= difference <= upper
    return visible


def check(visible, row_tile, key_tile, lower, upper):
    T, S = visible.shape
    for first in range(0, T, row_tile):
        last = min(first + row_tile, T) - 1
        found = tile_range(first, last, S, key_tile, lower, upper)
        assert 0 <= found.start <= found.full_start <= found.full_stop <= found.stop
        for tile in range(-(-S // key_tile)):
            scores = visible[first : last + 1, tile * key_tile : (tile + 1) * key_tile]
            whole = scores.shape[1] == key_tile
            assert found.start <= tile < found.stop or not scores.any()
            assert (found.full_start <= tile < found.full_stop) == (scores.all() and whole)


@pytest.mark.parametrize("seed", range(8))
def test_every_seen_tile_is_visited_and_exactly_the_full_ones_need_no_mask(seed):
    rng = random.Random(seed)
    for _ in range(100):
        T, S = rng.randint(1, 40), rng.randint(1, 40)
        lower, upper = (rng.choice([None, rng.randint(-20, 20)]) for _ in range(2))
        row_tile, key_tile = rng.choice([1, 3, 4, 8]), rng.choice([1, 2, 4, 8])
        visible = band(T, S, lower, upper)
        check(visible, row_tile, key_tile, lower, upper)
        check(visible.T, key_tile, row_tile, *transposed(lower, upper))


def test_numpy_and_traced_values_give_what_integers_give():
    firsts = np.arange(0, 64, 8)
    for lower, upper in itertools.product([None, -9, 3], [None, 0, 11]):
        one_by_one = [tile_range(int(f), int(f) + 7, 50, 16, lower, upper) for f in firsts]
        expected = np.array(one_by_one).T
        many = tile_range(firsts, firsts + 7, 50, 16, lower, upper)
        np.testing.assert_array_equal([np.broadcast_to(x, 8) for x in many], expected)
        traced = jax.jit(lambda f, lower=lower, upper=upper: tile_range(f, f + 7, 50, 16, lower, upper))(
            jnp.asarray(firsts, jnp.int32)
        )
        np.testing.assert_array_equal([np.broadcast_to(x, 8) for x in traced], expected)


@pytest.mark.parametrize("order", ["packed", "shuffled"])
def test_segment_tiles_hold_every_tile_where_segments_meet(order):
    rng = np.random.default_rng(0)
    row_tile, key_tile = 4, 8
    rows, keys = rng.integers(0, 5, (3, 30)), rng.integers(0, 5, (3, 41))
    if order == "packed":
        rows, keys = np.sort(rows), np.sort(keys)
    start, stop, uniform = map(np.asarray, segment_tiles(jnp.int32(rows), jnp.int32(keys), row_tile, key_tile))
    skipped = 0
    for b, q, k in itertools.product(range(3), range(8), range(6)):
        same = np.equal.outer(rows[b, q * row_tile : (q + 1) * row_tile], keys[b, k * key_tile : (k + 1) * key_tile])
        skipped += not start[b, q] <= k < stop[b, q]
        assert start[b, q] <= k < stop[b, q] or not same.any()
        assert uniform[b, q, k] == (same.all() and same.shape == (row_tile, key_tile))
    assert (skipped > 20) == (order == "packed")


def test_segments_that_no_key_has_visit_nothing():
    start, stop, _ = segment_tiles(jnp.full((1, 8), 7, jnp.int32), jnp.zeros((1, 8), jnp.int32), 4, 4)
    np.testing.assert_array_equal(start, stop)


@pytest.mark.parametrize(("block_q", "block_kv"), [(4, 8), (12, 3), (5, 40), (1, 7)])
@pytest.mark.parametrize("heads", [None, 2])
def test_block_tiles_tell_where_some_and_where_all_entries_are_kept(block_q, block_kv, heads):
    T, S, row_tile, key_tile = 30, 37, 4, 8
    blocks = (-(-T // block_q), -(-S // block_kv))
    mask = np.random.default_rng(0).random(blocks if heads is None else (heads, *blocks)) < 0.6
    blocks = BlockMask(mask, block_q, block_kv)
    some, whole = map(np.asarray, block_tiles(blocks, T, S, row_tile, key_tile))
    dense = np.asarray(blocks.dense(T, S))
    assert some.shape == (heads or 1, 8, 5)
    for n, i, j in np.ndindex(some.shape):
        tile = dense[n, i * row_tile : (i + 1) * row_tile, j * key_tile : (j + 1) * key_tile]
        assert (some[n, i, j], whole[n, i, j]) == (tile.any(), tile.all())


def test_lists_hold_whole_tiles_first_then_partial_ones_in_order():
    some = jnp.array([[True, False, True, True, True], [False] * 5])
    whole = jnp.array([[False, True, True, False, True], [True] * 5])
    order, num_whole, num_kept = map(np.asarray, list_tiles(some, whole))
    np.testing.assert_array_equal(order[0, :4], [2, 4, 0, 3])
    np.testing.assert_array_equal((num_whole, num_kept), [[2, 0], [4, 0]])
