"""The IO model against the paper's figures and against counts by hand."""

import numpy as np
import pytest

from pallas_kernels import BlockMask
from pallas_kernels.io_model import A100, Loop, Problem, kernel_loops, paper_loops, standard_bytes, total_bytes

# Figure 2 of arXiv 2205.14135: GPT-2 medium's attention, fp16. One pass over a 64 x 16 x 1024 x 64 tensor is 0.134 GB.
PAPER = Problem(T=1024, S=1024, H=64, N=16, K=16, batch=64)


def test_standard_attention_moves_the_papers_40_gb():
    assert PAPER.pass_bytes == 134_217_728
    assert standard_bytes(PAPER, masks_and_drops=True) / 1e9 == pytest.approx(40.3, abs=0.05)
    assert standard_bytes(PAPER) == 11 * 64 * 16 * 1024**2 * 2 + 12 * 134_217_728
    assert standard_bytes(PAPER, backward=False) == 4 * 64 * 16 * 1024**2 * 2 + 4 * 134_217_728


@pytest.mark.parametrize(("columns", "tiles", "gigabytes"), [(128, 8, 9.40), (256, 4, 5.10), (384, 3, 4.03)])
def test_flash_attention_moves_the_papers_passes(columns, tiles, gigabytes):
    forward = total_bytes(paper_loops(columns, backward=False), PAPER)
    backward = total_bytes(paper_loops(columns, forward=False), PAPER)
    assert forward == (2 + 3 * tiles) * PAPER.pass_bytes
    assert backward == (4 + 5 * tiles) * PAPER.pass_bytes
    assert (forward + backward) / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_the_measured_4_4_gb_lie_between_256_and_384_columns():
    assert total_bytes(paper_loops(384), PAPER) < 4.4e9 < total_bytes(paper_loops(256), PAPER)


def test_flash_needs_a_sixth_more_operations_than_standard_attention():
    """Seven matmuls instead of six; the paper counts 1.13 with what both do beside them."""
    matmuls = sum(loop.operations(PAPER) for loop in paper_loops(256)) / (2 * 64 * 16 * 1024**2 * 64)
    assert matmuls == 7


def test_block_sparse_traffic_follows_the_fraction_kept():
    """Nd + N^2 d^2 s / M: what is owned stays, what passes by shrinks with s."""
    loop = Loop(owns_rows=True, own_tile=128, step_tile=128, own_tensors=2, step_tensors=2, matmuls=2)
    length = 4096
    dense = Problem(T=length, S=length)
    for mask in (BlockMask.butterfly(length, length), BlockMask.strided(length, length, stride=4)):
        sparse = Problem(T=length, S=length, block_mask=mask)
        owned = 2 * dense.pass_bytes
        assert loop.bytes(sparse) - owned == pytest.approx((loop.bytes(dense) - owned) * float(mask.density))
        assert loop.operations(sparse) == pytest.approx(loop.operations(dense) * float(mask.density))


def test_causal_tiles_are_counted_as_the_kernel_visits_them():
    # Rows 0-1, 2-3, 4 of 5 see keys up to 1, 3, 4: of tiles of 3 keys 1, 2 and 2, of 3 and 2 keys.
    loop = Loop(owns_rows=True, own_tile=2, step_tile=3, own_tensors=1, step_tensors=1, matmuls=1, own_vectors=1)
    problem = Problem(T=5, S=5, H=8, N=3, K=1, batch=2, upper=0)
    np.testing.assert_array_equal(loop.visited(problem)[0], [[True, False], [True, True], [True, True]])
    assert loop.bytes(problem) == 2 * 3 * (5 * (8 * 2 + 4) + (3 + 5 + 5) * 8 * 2)
    assert loop.operations(problem) == 2 * 3 * 5 * (2 * 2 * 3 * 8)


def test_a_kernel_that_owns_keys_sees_the_band_from_their_side():
    loop = Loop(owns_rows=False, own_tile=3, step_tile=2, own_tensors=2, step_tensors=1, matmuls=1, shares_group=True)
    problem = Problem(T=5, S=5, H=8, N=3, K=1, upper=0)
    # Keys 0-2 are seen by all rows, keys 3-4 by rows 3 and 4: tiles of two rows 3, and 2 of them with 2 and 1 rows.
    np.testing.assert_array_equal(loop.visited(problem)[0], [[True, True, True], [False, True, True]])
    assert loop.bytes(problem) == 5 * 2 * 8 * 2 + 3 * (5 + 3) * 8 * 2


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_the_kernels_loops_cover_forward_and_every_gradient(head_dim):
    problem = Problem(T=2048, S=2048, H=head_dim, N=8, K=2, upper=0)
    loops = kernel_loops(problem)
    assert sum(not loop.owns_rows for loop in loops) >= 1
    assert len(kernel_loops(problem, backward=False)) == 1
    for loop in loops:
        assert (loop.visited(problem).sum() < loop.visited(Problem(T=2048, S=2048)).sum()).all()
    assert total_bytes(loops, problem) < standard_bytes(problem)


def test_padded_head_dims_are_refused():
    with pytest.raises(ValueError, match="multiple of 64, got 80"):
        kernel_loops(Problem(T=8, S=8, H=80))


def test_the_least_time_is_that_of_what_holds():
    assert A100.seconds(1.555e12, 0) == 1
    assert A100.seconds(1.555e12, 624e12) == 2
