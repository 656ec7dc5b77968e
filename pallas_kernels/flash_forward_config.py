"""Tile sizes of the Hopper forward kernel, by head dim and by what its inner loop has to do.

A thread block has one warpgroup that loads and two or three that compute; each of these owns `rows` query rows and
steps through tiles of `keys` keys. The scores (rows x keys) and the output (rows x head dim) of a tile lie in its
registers, of which three warpgroups have 160 a thread and two have 240. Three whose instructions interleave keep the
tensor cores busier than two that take turns.
"""

from dataclasses import dataclass, replace

from .attention_spec import AttentionOperands, AttentionSpec
from .tuned_tables import tuned


@dataclass(frozen=True, kw_only=True)
class ForwardConfig:
    """Tiles of one kernel.

    rows: query rows of a warpgroup; warpgroups: how many compute; keys: of a tile, multiples of 64; stages: tiles of
    keys, and as many of values, in shared memory at once.
    """

    rows: int = 64
    keys: int
    warpgroups: int
    stages: int

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that computes and of one that loads: together at most the 65,536 of a multiprocessor."""
        return (240, 24) if self.warpgroups < 3 else (160, 32)


def default_config(head_dim: int, operands: AttentionOperands, spec: AttentionSpec) -> ForwardConfig:
    """The fastest that was measured, made smaller where more has to fit. head_dim: a multiple of 64."""
    config = ForwardConfig(**tuned("flash_forward", head_dim))
    if head_dim > 128:
        return config
    if operands.block_mask is not None and operands.block_mask.block_kv % config.keys:
        config = replace(config, keys=64)
    if spec.dropout_rate > 0.0:
        # Its arithmetic needs registers, more so beside masks that read arrays or have two sides.
        crowded = operands.key_lengths is not None or operands.query_segments is not None or spec.lower is not None
        if crowded:
            config = replace(config, keys=64)
        if head_dim > 64 or not crowded:
            config = replace(config, warpgroups=2)
    return config
