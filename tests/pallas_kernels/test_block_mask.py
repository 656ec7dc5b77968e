"""Patterns of blocks, and BlockMask as a pytree."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMask

SIZES = {"block_q": 4, "block_kv": 8}


def test_local_keeps_blocks_near_the_diagonal():
    mask = BlockMask.local(20, 33, width=1, **SIZES).mask
    assert mask.shape == (5, 5)
    np.testing.assert_array_equal(mask, np.tri(5, k=1, dtype=bool) & np.tri(5, k=1, dtype=bool).T)


def test_strided_keeps_every_nth_diagonal():
    mask = np.asarray(BlockMask.strided(24, 48, stride=3, **SIZES).mask)
    np.testing.assert_array_equal(mask, (np.eye(6) + np.eye(6, k=3) + np.eye(6, k=-3)) == 1)


def test_butterfly_joins_blocks_that_differ_in_one_bit():
    # The product of the factors of an 8-point butterfly, flattened: block i meets i, i+-1, i+-2 and i+-4 by its bits.
    expected = np.zeros((8, 8), bool)
    for i in range(8):
        expected[i, [i, i ^ 1, i ^ 2, i ^ 4]] = True
    np.testing.assert_array_equal(BlockMask.butterfly(32, 64, **SIZES).mask, expected)
    for i in range(8):
        expected[i, i ^ 4] = False
    np.testing.assert_array_equal(BlockMask.butterfly(32, 64, max_stride=2, **SIZES).mask, expected)


def test_full_keeps_all_and_density_is_the_kept_fraction():
    assert BlockMask.full(9, 9, **SIZES).mask.shape == (3, 2)
    assert BlockMask.full(9, 9, **SIZES).density == 1.0
    assert BlockMask.strided(24, 48, stride=3, **SIZES).density == pytest.approx(12 / 36)


def test_dense_repeats_each_block_and_cuts_the_last():
    mask = BlockMask(jnp.array([[True, False], [False, True], [True, True]]), **SIZES)
    dense = np.asarray(mask.dense(10, 13))
    assert dense.shape == (1, 10, 13)
    for i, j in np.ndindex(10, 13):
        assert dense[0, i, j] == mask.mask[i // 4, j // 8]


def test_masks_combine_where_their_blocks_are_equal():
    local, strided = BlockMask.local(32, 64, width=0, **SIZES), BlockMask.strided(32, 64, stride=4, **SIZES)
    np.testing.assert_array_equal((local | strided).mask, local.mask | strided.mask)
    np.testing.assert_array_equal((local & strided).mask, local.mask & strided.mask)
    with pytest.raises(ValueError, match=r"4, 8, \(8, 8\).*8, 8, \(4, 8\)"):
        _ = local | BlockMask.full(32, 64, block_q=8, block_kv=8)


def test_it_passes_through_jit_with_its_mask_as_the_only_leaf():
    mask = BlockMask.local(32, 64, **SIZES)
    traces = []

    @jax.jit
    def density(mask):
        traces.append(mask.block_q)
        return mask.density

    assert density(mask) == mask.density
    assert density(BlockMask.full(32, 64, **SIZES)) == 1.0
    assert traces == [4]
    assert len(jax.tree.leaves(mask)) == 1


@pytest.mark.usefixtures("no_annotation_checks")
@pytest.mark.parametrize(
    ("mask", "sizes", "message"),
    [
        (jnp.ones((2, 2)), (4, 4), "must be bool, got float32"),
        (np.ones((2, 2), np.int32), (4, 4), "must be bool, got int32"),
        (jnp.ones(4, bool), (4, 4), "got (4,)"),
        (jnp.ones((2, 2), bool), (0, 4), "must be positive, got 0 and 4"),
    ],
)
def test_bad_masks_are_named(mask, sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BlockMask(mask, *sizes)


def test_a_stride_must_be_positive():
    with pytest.raises(ValueError, match="positive, got 0"):
        BlockMask.strided(8, 8, stride=0)
