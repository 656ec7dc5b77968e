"""How many bytes attention moves between a GPU's memory and its chip: the IO analysis of FlashAttention (arXiv
2205.14135, section 3.2 and appendix B) over the very tiles that kernels visit.

A kernel owns tiles of one side, rows or keys, and for each steps through the tiles of the other side that it sees.
What it owns it moves once, what it steps through once for each visit. Every load counts as one from memory: what an L2
cache keeps comes on top.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .attention_spec import AttentionOperands, AttentionSpec
from .block_mask import BlockMask
from .flash_attention_mosaic_backward import default_config as backward_config
from .flash_forward_config import default_config as forward_config
from .tiles import block_tiles, tile_range, transposed


@dataclass(frozen=True)
class Problem:
    """Attention over `batch` sequences: N query heads and K kv heads of H, T rows and S keys.

    lower, upper: the band of `AttentionSpec`; causal is upper = 0. itemsize: bytes of a number.
    """

    T: int
    S: int
    H: int = 64
    N: int = 1
    K: int = 1
    batch: int = 1
    itemsize: int = 2
    lower: int | None = None
    upper: int | None = None
    block_mask: BlockMask | None = None

    @property
    def pass_bytes(self) -> int:
        """One read or write of a tensor as large as the queries."""
        return self.batch * self.N * self.T * self.H * self.itemsize

    @property
    def key_pass_bytes(self) -> int:
        """One read or write of a tensor as large as the keys."""
        return self.batch * self.K * self.S * self.H * self.itemsize

    @property
    def score_bytes(self) -> int:
        """One read or write of all scores."""
        return self.batch * self.N * self.T * self.S * self.itemsize


@dataclass(frozen=True)
class Loop:
    """The loops of one kernel.

    owns_rows: whether it owns rows, one query head at a time, or keys. A kernel that owns keys runs once for a query
    head, or where `shares_group` once for a kv head, stepping through all its query heads.
    own_tile, step_tile: positions of a tile; a block's, where warpgroups share what is loaded.
    own_tensors, step_tensors: how many [length, H] tensors it reads or writes of each side's tile.
    matmuls: of own_tile x step_tile x H, for each tile visited.
    own_vectors, step_vectors: how many float32 values of a position, such as the log-sum-exp.
    """

    owns_rows: bool
    own_tile: int
    step_tile: int
    own_tensors: int
    step_tensors: int
    matmuls: int
    own_vectors: int = 0
    step_vectors: int = 0
    shares_group: bool = False

    def visited(self, problem: Problem) -> np.ndarray:
        """Which step tiles each own tile visits: bool [N|1, own tiles, step tiles]."""
        own_length, step_length = self._lengths(problem)
        band = problem.lower, problem.upper
        first = np.arange(0, own_length, self.own_tile)[:, None]
        last = np.minimum(first + self.own_tile, own_length) - 1
        seen = tile_range(first, last, step_length, self.step_tile, *(band if self.owns_rows else transposed(*band)))
        tile = np.arange(-(-step_length // self.step_tile))[None]
        visited = ((tile >= seen.start) & (tile < seen.stop) & (first >= 0))[None]
        if problem.block_mask is not None:
            tiles = (self.own_tile, self.step_tile) if self.owns_rows else (self.step_tile, self.own_tile)
            kept = np.asarray(block_tiles(problem.block_mask, problem.T, problem.S, *tiles)[0])
            visited = visited & (kept if self.owns_rows else kept.swapaxes(1, 2))
        return visited

    def bytes(self, problem: Problem) -> int:
        """All that one run of the kernel moves."""
        own_length, step_length = self._lengths(problem)
        visited = self.visited(problem)
        sizes = np.minimum(step_length - np.arange(visited.shape[2]) * self.step_tile, self.step_tile)
        stepped = int((visited * sizes).sum()) * problem.N // visited.shape[0]
        owned = own_length * (problem.K if self.shares_group else problem.N)
        own = self.own_tensors * problem.H * problem.itemsize + 4 * self.own_vectors
        step = self.step_tensors * problem.H * problem.itemsize + 4 * self.step_vectors
        return problem.batch * (owned * own + stepped * step)

    def operations(self, problem: Problem) -> int:
        """Multiplications and additions; a tile that the lengths cut short is computed whole."""
        visited = self.visited(problem)
        tiles = problem.batch * problem.N * int(visited.sum()) // visited.shape[0]
        return 2 * self.matmuls * tiles * self.own_tile * self.step_tile * problem.H

    def _lengths(self, problem: Problem) -> tuple[int, int]:
        return (problem.T, problem.S) if self.owns_rows else (problem.S, problem.T)


def total_bytes(loops: Sequence[Loop], problem: Problem) -> int:
    """What several kernels move, one after the other.

    >>> total_bytes(paper_loops(256), Problem(T=1024, S=1024, N=16, K=16, batch=64)) / 1e9
    5.100273664
    """
    return sum(loop.bytes(problem) for loop in loops)


def paper_loops(columns: int, *, rows: int = 64, forward: bool = True, backward: bool = True) -> list[Loop]:
    """Algorithms 1 and 4 of the paper, vectors left out as there: each tile of `columns` keys is held while all rows
    pass by, with their output read and written again: 2 + 3 Tc passes forward, 4 + 5 Tc backward."""
    loops = []
    if forward:  # K, V; Q, O, O
        loops.append(Loop(owns_rows=False, own_tile=columns, step_tile=rows, own_tensors=2, step_tensors=3, matmuls=2))
    if backward:  # K, V, dK, dV; Q, O, dO, dQ, dQ
        loops.append(Loop(owns_rows=False, own_tile=columns, step_tile=rows, own_tensors=4, step_tensors=5, matmuls=5))
    return loops


def kernel_loops(problem: Problem, *, forward: bool = True, backward: bool = True) -> list[Loop]:
    """The Hopper kernels, with the tiles that they take for this problem; H a multiple of 64, as they pad it to."""
    if problem.H % 64:
        raise ValueError(f"kernel_loops: H must be a multiple of 64, got {problem.H}")
    loops = []
    operands = AttentionOperands(block_mask=problem.block_mask)
    spec = AttentionSpec(problem.H**-0.5, problem.lower, problem.upper)
    if forward:
        config = forward_config(problem.H, operands, spec)
        rows = config.rows * config.warpgroups
        # Q, O and the log-sum-exp; K, V.
        loops.append(Loop(True, rows, config.keys, own_tensors=2, step_tensors=2, matmuls=2, own_vectors=1))
    for wanted, tiles in backward_config(problem.H, operands, spec).launches if backward else ():
        own = tiles.own * tiles.warpgroups
        if wanted == ("dq",):  # Q, dO, dQ, log-sum-exp and delta; K, V
            loops.append(Loop(True, own, tiles.step, own_tensors=3, step_tensors=2, matmuls=3, own_vectors=2))
        elif len(wanted) == 3:  # K, V, dK, dV; Q, dO, log-sum-exp, delta, and dQ in float32 read and written
            loops.append(Loop(False, own, tiles.step, 4, step_tensors=6, matmuls=5, step_vectors=2, shares_group=True))
        else:  # K, for dK also V, and the gradients; Q, dO, log-sum-exp and delta
            count = 1 + ("dk" in wanted) + len(wanted)
            loops.append(
                Loop(False, own, tiles.step, count, step_tensors=2, matmuls=count, step_vectors=2, shares_group=True)
            )
    return loops


def standard_bytes(
    problem: Problem, *, forward: bool = True, backward: bool = True, masks_and_drops: bool = False
) -> int:
    """Attention that leaves each of its steps in memory, as the paper's algorithms 0 and 3.

    Forward, S and P are written and read: 4 passes over all scores, beside Q, K, V and O. Backward reads P for dV,
    writes dP, reads P and dP, writes dS and reads it for dQ and for dK: 7, beside Q, K, V, dQ, dK, dV and twice dO.

    masks_and_drops: masking S and dropping entries of P read and write them once more, the latter backward too, where
    a byte an entry tells which: with 16-bit numbers 18 passes in all, the 40.3 GB that the paper measured.
    """
    scores, tensors = 4 * forward + 7 * backward, 2 * forward + 4 * backward  # tensors of rows, and as many of keys
    if masks_and_drops:
        scores += forward * (4 + 1 / problem.itemsize) + backward * (2 + 1 / problem.itemsize)
    return round(scores * problem.score_bytes + tensors * (problem.pass_bytes + problem.key_pass_bytes))


@dataclass(frozen=True)
class Machine:
    """bandwidth: bytes a second between memory and chip; flops: 16-bit matrix operations a second."""

    name: str
    bandwidth: float
    flops: float

    def seconds(self, moved: float | int, operations: float | int) -> float:
        """The least time, where moving and computing overlap wholly."""
        return max(moved / self.bandwidth, operations / self.flops)


A100 = Machine("A100", 1.555e12, 312e12)
H100 = Machine("H100", 3.35e12, 989e12)
