"""Block-sparse attention: which blocks of the score matrix exist at all (FlashAttention, arXiv 2205.14135, 3.3)."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockMask:
    """Row i sees key j only where mask[..., i // block_q, j // block_kv]. Blocks that are off cost nothing.

    Args:
      mask: bool [q_blocks, kv_blocks], the same for all heads, or [N, q_blocks, kv_blocks], one for each query head.
      block_q, block_kv: rows and keys of a block. Multiples of 128 suit the GPU's tiles.

    A pytree whose only leaf is `mask`, so it passes through jit, and another mask of the same shape compiles nothing
    anew. `a & b` and `a | b` combine masks of equal blocks.

    Raises ValueError where mask is not bool or not of two or three dimensions, or where a block size is not positive.

    >>> BlockMask.local(512, 512, width=1, block_q=128, block_kv=128).mask.sum()
    Array(10, dtype=int32)
    """

    mask: Any
    block_q: int = field(metadata={"static": True})
    block_kv: int = field(metadata={"static": True})

    def __post_init__(self):
        if self.block_q <= 0 or self.block_kv <= 0:
            raise ValueError(f"BlockMask: block sizes must be positive, got {self.block_q} and {self.block_kv}")
        # JAX rebuilds pytrees with leaves of its own (tracers, None, specs): only arrays can be wrong.
        if isinstance(self.mask, np.ndarray):
            object.__setattr__(self, "mask", jnp.asarray(self.mask))
        if isinstance(self.mask, jax.Array):
            if self.mask.dtype != jnp.bool_:
                raise ValueError(f"BlockMask: mask must be bool, got {self.mask.dtype}")
            if self.mask.ndim not in (2, 3):
                raise ValueError(
                    f"BlockMask: mask must be [q_blocks, kv_blocks] or [heads, q_blocks, kv_blocks], "
                    f"got {self.mask.shape}"
                )

    @classmethod
    def full(cls, q_len: int, kv_len: int, *, block_q: int = 128, block_kv: int = 128) -> "BlockMask":
        """Every block."""
        rows, columns = _blocks(q_len, kv_len, block_q, block_kv)
        return cls(
            jnp.asarray(np.broadcast_to(True, np.broadcast_shapes(rows.shape, columns.shape))), block_q, block_kv
        )

    @classmethod
    def local(cls, q_len: int, kv_len: int, *, width: int = 1, block_q: int = 128, block_kv: int = 128) -> "BlockMask":
        """Blocks at most `width` blocks off the diagonal."""
        rows, columns = _blocks(q_len, kv_len, block_q, block_kv)
        return cls(jnp.asarray(abs(rows - columns) <= width), block_q, block_kv)

    @classmethod
    def strided(cls, q_len: int, kv_len: int, *, stride: int, block_q: int = 128, block_kv: int = 128) -> "BlockMask":
        """Every `stride`-th block counted from the diagonal, as the strided pattern of Sparse Transformers
        (arXiv 1904.10509); join it with `local` for theirs whole."""
        if stride <= 0:
            raise ValueError(f"BlockMask.strided: stride must be positive, got {stride}")
        rows, columns = _blocks(q_len, kv_len, block_q, block_kv)
        return cls(jnp.asarray((rows - columns) % stride == 0), block_q, block_kv)

    @classmethod
    def butterfly(
        cls, q_len: int, kv_len: int, *, max_stride: int | None = None, block_q: int = 128, block_kv: int = 128
    ) -> "BlockMask":
        """The flat block butterfly (Pixelated Butterfly, arXiv 2112.00029), the pattern of FlashAttention's
        block-sparse runs: the diagonal, and the blocks whose row and column numbers differ in one bit.

        Args:
          max_stride: greatest such difference, a power of two; None means all.
        """
        rows, columns = _blocks(q_len, kv_len, block_q, block_kv)
        difference = rows ^ columns
        kept = (difference & (difference - 1)) == 0  # zero or a power of two
        if max_stride is not None:
            kept &= difference <= max_stride
        return cls(jnp.asarray(kept), block_q, block_kv)

    @property
    def density(self) -> Array:
        """The fraction of blocks kept, s in the paper; float32."""
        return self.mask.mean(dtype=jnp.float32)

    def dense(self, q_len: int, kv_len: int) -> Bool[Array, "#N T S"]:
        """The same mask entry by entry."""
        mask = self.mask if self.mask.ndim == 3 else self.mask[None]
        return jnp.repeat(jnp.repeat(mask, self.block_q, 1), self.block_kv, 2)[:, :q_len, :kv_len]

    def __and__(self, other: "BlockMask") -> "BlockMask":
        return BlockMask(self.mask & self._like_mine(other), self.block_q, self.block_kv)

    def __or__(self, other: "BlockMask") -> "BlockMask":
        return BlockMask(self.mask | self._like_mine(other), self.block_q, self.block_kv)

    def _like_mine(self, other: "BlockMask") -> Array:
        mine, its = ((m.block_q, m.block_kv, m.mask.shape) for m in (self, other))
        if mine != its:
            raise ValueError(f"BlockMask: blocks and shapes must be equal, got {mine} and {its}")
        return other.mask


def _blocks(q_len: int, kv_len: int, block_q: int, block_kv: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the row blocks, as a column, and of the key blocks, as a row."""
    return np.arange(-(-q_len // block_q))[:, None], np.arange(-(-kv_len // block_kv))[None]
