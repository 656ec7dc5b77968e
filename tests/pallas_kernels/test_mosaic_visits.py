"""Which tiles the blocks of a fused backward visit, and whose turn it is at each."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic_visits import RangedVisits, Side, Visits
from pallas_kernels.tiles import transposed

KEYS, QUERIES, TILE = 1216, 1000, 64  # 10 blocks of 128 keys, 16 tiles of queries

BANDS = {
    "all": (None, None),
    "causal": (None, 0),
    "causal with an offset": (None, KEYS - QUERIES),
    "window": (-200, 0),
    "window on both sides": (-130, 90),
    "only later keys": (-30, None),
}


def of_keys(band: tuple[int | None, int | None]) -> Visits:
    own, step = Side(TILE, KEYS), Side(TILE, QUERIES)
    return Visits(own, step, 2, transposed(*band), mask_tail=False)


def paths(visits: Visits) -> list[list[int]]:
    """The tiles of each block, in its order."""

    def path(block):
        ranged = RangedVisits(visits, visits.tables(), jnp.int32(0), block)
        indices = jnp.arange(visits.step.tiles, dtype=jnp.int32)
        return ranged.count, jax.vmap(lambda index: ranged.tile(ranged.count - 1 - index))(indices)

    counts, tiles = jax.jit(jax.vmap(path))(jnp.arange(visits.blocks, dtype=jnp.int32))
    return [row[:count].tolist() for count, row in zip(counts.tolist(), np.asarray(tiles), strict=True)]


def turns(visits: Visits) -> np.ndarray:
    """[block, tile]; of tiles that a block does not visit they mean nothing."""
    tables = visits.turns()

    def turn(block, tile):
        return visits.turn(tables, jnp.int32(0), block, tile)

    blocks, tiles = (jnp.arange(count, dtype=jnp.int32) for count in (visits.blocks, visits.step.tiles))
    return np.asarray(jax.jit(jax.vmap(jax.vmap(turn, (None, 0)), (0, None)))(blocks, tiles))


@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
class TestBand:
    def test_each_block_visits_its_tiles_once(self, band):
        visits = of_keys(band)
        for path, visited in zip(paths(visits), np.asarray(visits.visited())[0], strict=True):
            assert sorted(path) == np.flatnonzero(visited).tolist()

    def test_all_turns_of_a_tile_are_taken(self, band):
        visits = of_keys(band)
        turn = turns(visits)
        for tile, visited in enumerate(np.asarray(visits.visited())[0].T):
            assert sorted(turn[visited, tile]) == list(range(visited.sum()))

    def test_lengths_that_cut_nothing_change_no_turn(self, band):
        visits = of_keys(band)
        lengths = jnp.array([QUERIES], jnp.int32)
        listed = replace(visits, step=replace(visits.step, lengths=lengths))
        assert not visits.turns()
        assert listed.turns()
        assert paths(listed) == paths(visits)
        visited = np.asarray(visits.visited())[0]
        np.testing.assert_array_equal(turns(listed)[visited], turns(visits)[visited])

    def test_nobody_waits_for_a_block_that_is_launched_later(self, band):
        visits = of_keys(band)
        turn, added = turns(visits), np.zeros(visits.step.tiles, int)
        for block, path in enumerate(paths(visits)):
            assert turn[block, path].tolist() == added[path].tolist()
            added[path] += 1

    def test_whole_tiles_are_visited_in_one_run(self, band):
        """None within it is hidden in part."""
        visits = of_keys(band)
        lower, upper = band
        for block, path in enumerate(paths(visits)):
            ranged = RangedVisits(visits, (), jnp.int32(0), jnp.int32(block))
            after, whole = ranged.runs_from_last(hides=False)
            assert 0 <= after <= whole <= len(path)
            assert [tile for tile in path if not ranged.is_partial(tile)] == path[after:whole]
            for tile in path[after:whole]:
                keys = block * 2 * TILE + np.arange(2 * TILE)
                distance = keys[None] - (tile * TILE + np.arange(TILE))[:, None]
                assert lower is None or distance.min() >= lower
                assert upper is None or distance.max() <= upper


def test_segments_and_lengths_leave_every_turn_to_somebody():
    rng = np.random.default_rng(0)
    segments = [jnp.asarray(np.sort(rng.integers(0, 5, (2, n))), jnp.int32) for n in (KEYS, QUERIES)]
    lengths = [jnp.array(n, jnp.int32) for n in ([700, 1216], [1000, 130])]
    own, step = (Side(TILE, n, lengths[i], segments[i]) for i, n in enumerate((KEYS, QUERIES)))
    visits = Visits(own, step, 2, transposed(None, 0), mask_tail=False)
    visited, (turn,) = np.asarray(visits.visited()), visits.turns()
    for b in range(2):
        for tile in range(visits.step.tiles):
            taken = np.asarray(turn)[b, visited[b, :, tile], tile]
            assert sorted(taken) == list(range(visited[b, :, tile].sum()))
