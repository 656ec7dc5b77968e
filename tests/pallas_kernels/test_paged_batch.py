"""What `PagedBatch.check` finds."""

import re
from typing import Any

import jax.numpy as jnp
import pytest

from pallas_kernels import KVCache, PagedBatch

CACHE = KVCache.create(num_layers=1, num_blocks=9, block_size=4, num_kv_heads=1, head_dim=2)


def batch(**changes):
    """Two decodes at lengths 6 and 1, a chunk of three tokens after four, padding; block 9 past the contexts."""
    fields: dict[str, Any] = {
        "block_tables": [[7, 2], [8, 9], [5, 0], [9, -1]],
        "context_lens": [6, 1, 7, 0],
        "query_starts": [0, 1, 2, 5, 5],
        "slot_mapping": [9, 32, 0, 1, 2, -1],
        "num_decodes": 2,
    }
    given = {name: jnp.asarray(value, jnp.int32) for name, value in (fields | changes).items()}
    return PagedBatch(**given, max_query_len=3)


def test_a_right_batch_passes():
    batch().check(CACHE)
    batch(slot_mapping=[9, -1, 0, -1, 35, -1]).check(CACHE)  # a token need not be written


def sharing(**changes):
    """Four decodes, of which the first three share a block, and a prefill."""
    fields: dict[str, Any] = {
        "block_tables": [[7, 2], [7, 3], [7, 4], [5, 0], [6, 0]],
        "context_lens": [6, 8, 5, 3, 2],
        "query_starts": [0, 1, 2, 3, 4, 6],
        "slot_mapping": [9, 15, 16, 22, 24, 25],
        "num_decodes": 4,
        "shared_prefix_lens": [4, 4, 4, 0, 0],
    }
    return batch(**fields | changes)


def test_groups_of_one_length_may_be_neighbours():
    sharing().check(CACHE)
    sharing(block_tables=[[7, 2], [7, 3], [8, 4], [5, 0], [6, 0]]).check(CACHE)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"shared_prefix_lens": [4, 4, -4, 0, 0]}, "shared_prefix_lens must not be negative, got -4 at [2]"),
        ({"shared_prefix_lens": [4, 4, 4, 0, 4]}, "shared_prefix_lens must be 0 after the 4 decodes, got 4 at [0]"),
        ({"shared_prefix_lens": [4, 3, 4, 0, 0]}, "must be multiples of the block size 4, got 3 at [1]"),
        ({"context_lens": [6, 4, 5, 3, 2]}, "must be below the contexts [6, 4, 5, 3, 2], got 4 at [1]"),
        (
            {
                "block_tables": [[7, 2, 0], [7, 3, 1], [5, 4, 0], [5, 0, 0], [6, 0, 0]],
                "context_lens": [9, 9, 5, 3, 2],
                "shared_prefix_lens": [8, 8, 4, 0, 0],
            },
            "block_tables must name the blocks of the row before in a shared prefix, got 3 at [0, 1]",
        ),
    ],
)
def test_a_wrong_shared_prefix_is_named(changes, expected):
    with pytest.raises(ValueError, match=re.escape(expected) + "$"):
        sharing(**changes).check(CACHE)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"query_starts": [1, 2, 3, 5, 5]}, "query_starts must start at 0, got 1 at [0]"),
        ({"query_starts": [0, 1, 2, 5, 4]}, "query_starts must never decrease, got 4 at [3]"),
        ({"query_starts": [0, 1, 2, 5, 7]}, "query_starts must end within the 6 tokens, got 7 at [4]"),
        ({"query_starts": [0, 1, 2, 2, 6]}, "give no sequence more than max_query_len = 3, got 6 at [3]"),
        ({"num_decodes": 5}, "num_decodes must lie in [0, 4], got 5"),
        ({"num_decodes": -1}, "num_decodes must lie in [0, 4], got -1"),
        ({"num_decodes": 3}, "query_starts must give one token to each of 3 decodes, got 5 at [2]"),
        ({"context_lens": [6, 1, 2, 0]}, "context_lens must count the [1, 1, 3, 0] new tokens too, got 2 at [2]"),
        ({"context_lens": [9, 1, 7, 0]}, "context_lens must be at most 8, where a block table ends, got 9 at [0]"),
        ({"context_lens": [6, 5, 7, 0]}, "block_tables must lie in [0, 9) in a context, got 9 at [1, 1]"),
        ({"block_tables": [[7, -1], [8, 9], [5, 0], [9, 9]]}, "[0, 9) in a context, got -1 at [0, 1]"),
        ({"slot_mapping": [9, 36, 0, 1, 2, -1]}, "slot_mapping must lie in [-1, 36), got 36 at [1]"),
        ({"slot_mapping": [9, 32, -2, 1, 2, -1]}, "slot_mapping must lie in [-1, 36), got -2 at [2]"),
        ({"slot_mapping": [9, 32, 0, 1, 2, 3]}, "slot_mapping must be -1 past the last sequence, got 3 at [0]"),
        ({"slot_mapping": [9, 32, 1, 0, 1, -1]}, "slot_mapping must name no slot twice, got 1 at [1]"),
    ],
)
def test_the_first_wrong_value_is_named(changes, expected):
    with pytest.raises(ValueError, match=re.escape(expected) + "$"):
        batch(**changes).check(CACHE)
