"""The counter-based generator: the rate it keeps, no pattern along rows, columns, heads or seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dropout


def kept(seed0, seed1, head, rows, columns, rate):
    key1, key2 = dropout.row_keys(
        jnp.uint32(seed0), jnp.uint32(seed1), jnp.uint32(head), jnp.arange(*rows).astype("uint32")
    )
    columns = jnp.arange(*columns).astype("uint32")
    return np.asarray(dropout.keep(key1[:, None], key2[:, None], columns[None], rate))


@pytest.mark.parametrize("rate", [0.01, 0.17, 0.5, 0.9])
def test_the_kept_fraction_is_the_rate_of_a_fair_coin(rate):
    mask = kept(1, 2, 3, (512,), (2048,), rate)
    deviation = np.sqrt(rate * (1 - rate))
    assert abs(mask.mean() - (1 - rate)) < 5 * deviation / np.sqrt(mask.size)
    for axis in (0, 1):  # each column and each row by itself spreads as independent draws do
        spread = mask.mean(axis).std() / (deviation / np.sqrt(mask.shape[axis]))
        assert 0.85 < spread < 1.15


def test_entries_are_uncorrelated_at_every_shift():
    mask = kept(5, 6, 0, (512,), (512,), 0.5) - 0.5
    correlation = np.real(np.fft.ifft2(np.abs(np.fft.fft2(mask)) ** 2)) / (mask**2).sum()
    correlation[0, 0] = 0
    assert np.abs(correlation).max() < 6 / np.sqrt(mask.size)


@pytest.mark.parametrize("other", [(5, 7, 0), (6, 6, 0), (5, 6, 1), (6, 5, 0)])
def test_seeds_and_heads_are_independent(other: tuple[int, int, int]):
    one, two = kept(5, 6, 0, (256,), (256,), 0.5) - 0.5, kept(*other, (256,), (256,), 0.5) - 0.5
    assert abs((one * two).mean() * 4) < 5 / np.sqrt(one.size)


def test_a_tile_of_the_mask_is_the_mask_of_the_tile():
    whole = kept(9, 8, 4, (100,), (300,), 0.3)
    np.testing.assert_array_equal(kept(9, 8, 4, (64, 96), (128, 256), 0.3), whole[64:96, 128:256])


def test_no_two_rows_and_heads_of_a_seed_share_both_keys():
    head, row = jnp.arange(64, dtype=jnp.uint32)[:, None], jnp.arange(4096, dtype=jnp.uint32)[None]
    keys = np.stack([np.asarray(x).ravel() for x in dropout.row_keys(jnp.uint32(3), jnp.uint32(4), head, row)])
    assert len(np.unique(keys, axis=1).T) == 64 * 4096


def test_each_sequence_of_the_batch_has_seeds_of_its_own():
    seeds = np.asarray(dropout.batch_seeds(jax.random.key(0), 1000))
    assert seeds.shape == (1000, 2)
    assert seeds.dtype == np.uint32
    assert len(np.unique(seeds, axis=0)) == 1000
