"""What a call of `flash_attention` asks for, checked and in one form: the data that its backends share."""

from dataclasses import dataclass
from typing import Any

import jax

from .block_mask import BlockMask


@dataclass(frozen=True)
class AttentionSpec:
    """The static part.

    Causal order, its offset and windows are one band of diagonals: row i sees key j only if lower <= j - i <= upper,
    where None leaves that side open.
    """

    scale: float
    lower: int | None = None
    upper: int | None = None
    soft_cap: float | None = None
    dropout_rate: float = 0.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionOperands:
    """The arrays besides query, key and value; each is None where the call does not ask for it.

    JAX also builds this pytree of other leaves, such as specs and flags, so the types say no more than the comments.
    """

    bias: Any = None  # floating [B|1, N|1, T|1, S]
    mask: Any = None  # bool [B|1, N|1, T|1, S]
    query_lengths: Any = None  # int32 [B]
    key_lengths: Any = None  # int32 [B]
    query_segments: Any = None  # int32 [B, T]
    key_segments: Any = None  # int32 [B, S]
    block_mask: BlockMask | None = None
    dropout_seeds: Any = None  # uint32 [B, 2]
