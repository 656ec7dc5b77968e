"""Tile sizes of the Hopper forward kernel, by head dim and by what its inner loop has to do.

A thread block has one warpgroup that loads and two or three that compute; each of these owns `rows` query rows and
steps through tiles of `keys` keys. The scores (rows x keys) and the output (rows x head dim) of a tile lie in its
registers, of which three warpgroups have 160 a thread and two have 240. Three whose instructions interleave keep the
tensor cores busier than two that take turns.
"""

from dataclasses import dataclass

from .attention_spec import AttentionOperands, AttentionSpec


@dataclass(frozen=True)
class ForwardConfig:
    """Tiles of one kernel.

    rows: query rows of a warpgroup; warpgroups: how many compute; keys: of a tile, multiples of 64; stages: tiles of
    keys, and as many of values, in shared memory at once.
    """

    rows: int = 64
    keys: int = 128
    warpgroups: int = 3
    stages: int = 2

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that computes and of one that loads: together at most the 65,536 of a multiprocessor."""
        return (240, 24) if self.warpgroups < 3 else (160, 32)


def default_config(head_dim: int, operands: AttentionOperands, spec: AttentionSpec) -> ForwardConfig:
    """The fastest that compiles without spills. head_dim: a multiple of 64."""
    if head_dim > 128:
        return ForwardConfig(keys=64, warpgroups=2)
    keys = 128 if operands.block_mask is None or operands.block_mask.block_kv % 128 == 0 else 64
    # What segments and dropout keep for each row, and dropout's arithmetic, do not fit into 160 registers beside the
    # rest at head dim 128, nor both at 64.
    extras = (operands.query_segments is not None) + 2 * (spec.dropout_rate > 0.0)
    return ForwardConfig(keys=keys, warpgroups=2 if extras and (head_dim > 64 or extras > 2) else 3)
