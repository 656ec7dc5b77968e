"""Launches and tile sizes of the Hopper backward kernels, by head dim and by what their inner loop has to do.

A block owns a tile of keys, or of queries, for each computing warpgroup, and steps through tiles of the other side.
Fused, one launch owns keys and computes all three gradients: five matmuls a tile. Where its registers do not suffice,
dK and dV, or each of them, and dQ are launches of their own: seven matmuls or eight.
"""

from dataclasses import dataclass, replace
from typing import Literal

from .attention_spec import AttentionOperands, AttentionSpec
from .tuned_tables import tuned

Gradient = Literal["dq", "dk", "dv"]
ALL: tuple[Gradient, ...] = ("dk", "dv", "dq")  # fused


@dataclass(frozen=True)
class TileConfig:
    """Tiles of one launch: a warpgroup owns `own` rows and steps through tiles of `step` rows in a ring of slots.

    overlaps: dP is computed under the exponentials of S, and takes registers beside them; always where fused.
    heads: how many (sequence, head) pairs run side by side. The blocks of few find more of each other's tiles in the
      cache, those of many wait less for each other's turns.
    dq_tiles: fused, how many steps' dQ may wait for their turn to be added.
    """

    own: int = 64
    step: int = 64
    warpgroups: int = 2
    stages: int = 2
    overlaps: bool = True
    heads: int = 8
    dq_tiles: int = 1

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that computes and of one that loads; all threads together have 65,536."""
        return (240, 24) if self.warpgroups < 3 else (160, 32)


@dataclass(frozen=True)
class BackwardConfig:
    """The launches: which gradients each computes, and its tiles."""

    launches: tuple[tuple[tuple[Gradient, ...], TileConfig], ...]


def default_config(head_dim: int, operands: AttentionOperands, spec: AttentionSpec) -> BackwardConfig:
    """What compiles for a Hopper GPU without spills. head_dim: a multiple of 64.

    Fused, a step has 64 x 64 of dQ for each of two warpgroups: 128 queries at head dim 64, 64 at 128.
    Two accumulators of 64 x 192 do not fit, nor of 64 x 128 beside what a soft cap keeps for each entry or, under a
    block mask, dropout and segments together do: there dK and dV are launches of their own.
    """
    tiles = TileConfig()
    capped, segmented = spec.soft_cap is not None, operands.query_segments is not None
    dropping = spec.dropout_rate > 0.0
    if operands.block_mask is None:  # whose lists of tiles do not say whose turn it is
        fused = None
        if head_dim <= 64 and not (capped and segmented and dropping):
            fused = TileConfig(step=128)
        elif 64 < head_dim <= 128 and not capped:
            fused = TileConfig(dq_tiles=1 if segmented else 2)  # segment ids take the memory of the second
        if fused is not None:
            # The blocks of a segment are few and wait for each other at the same tile: more heads side by side.
            table = "flash_backward_packed" if segmented else "flash_backward"
            return fused_config(fused, spec, **tuned(table, head_dim))
    if head_dim <= 64 or (head_dim <= 128 and not (capped or (dropping and segmented))):
        return BackwardConfig(((("dk", "dv"), tiles), (("dq",), tiles)))
    if head_dim <= 192:
        return BackwardConfig(((("dk",), tiles), (("dv",), tiles), (("dq",), tiles)))
    # Here ptxas is at its limit, and a register more or less decides: these are what gave none away to memory.
    windowed = spec.lower is not None
    crowded = segmented or dropping or capped or windowed
    dk = TileConfig(
        stages=1, warpgroups=1 if crowded and not segmented else 2, overlaps=spec.upper is not None and not crowded
    )
    dq = TileConfig(stages=1, warpgroups=1 if dropping else 2, overlaps=not (dropping or capped or windowed))
    return BackwardConfig(((("dk",), dk), (("dv",), tiles), (("dq",), dq)))


def fused_config(tiles: TileConfig, spec: AttentionSpec, *, heads: int) -> BackwardConfig:
    """One launch. Under a causal mask, where blocks wait more, twice the tuned `heads` are faster."""
    return BackwardConfig(((ALL, replace(tiles, heads=heads if spec.upper is None else 2 * heads)),))
