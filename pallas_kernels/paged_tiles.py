"""Tiles of keys or values in shared memory, brought from the cache's blocks by TMA through a block table."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from .mosaic_common import PANEL, SWIZZLE, TILING, Ref, Scalar, columns, tile_memory, tile_views


def padded(head_dim: int) -> int:
    """The head dim as the kernels work on it, in panels.

    Where that is more than the cache has, a head's last panel also brings the beginning of the next head, or zeros:
    the query's zeros make nothing of them in the scores, and what they give in the output is cut off.
    """
    return -(-head_dim // PANEL) * PANEL


def row_tiles(*shape: int, dtype: jnp.dtype) -> Any:
    """Shared memory [..., rows, columns] as wgmma wants it, which TMA can fill by rows in eights, panels together."""
    return plgpu.SMEM(shape, dtype, transforms=(TILING, SWIZZLE))


@dataclass(frozen=True)
class PageTiles:
    """A ring of `stages` tiles of `tile` tokens, for some neighbouring kv heads, from blocks of `block_size` tokens."""

    tile: int
    stages: int
    block_size: int
    heads: int
    head_dim: int

    @property
    def rows(self) -> int:
        """Tokens of one copy: a block, or as much of it as tiles are made of."""
        return math.gcd(self.block_size, self.tile)

    @property
    def head_panels(self) -> int:
        return padded(self.head_dim) // PANEL

    @property
    def panels(self) -> int:
        return self.heads * self.head_panels

    @property
    def whole_rows(self) -> bool:
        """Whether one copy brings a token's keys of all heads, which then are whole panels."""
        return self.head_dim % PANEL == 0

    @property
    def copies(self) -> int:
        """That fill a tile."""
        return self.tile // self.rows * (1 if self.whole_rows else self.panels)

    @property
    def bytes(self) -> int:
        """Of the ring, in a 16-bit dtype."""
        return 2 * self.stages * self.tile * self.panels * PANEL

    def memory(self, dtype: jnp.dtype) -> Any:
        if self.whole_rows:
            return row_tiles(self.stages, self.tile, self.panels * PANEL, dtype=dtype)
        return tile_memory(self.stages, self.panels, self.tile, PANEL, dtype=dtype)

    def panel(self, memory: Ref, at: Scalar, panel: int) -> Ref:
        """A panel [tile, 64] of the tile in slot `at`."""
        if self.whole_rows:
            return memory.at[at, :, columns(panel)]
        return tile_views(memory)[1].at[at, panel]

    def cut(self, pages: Float[Array, "L P block_size K H"]) -> Float[Array, "pieces rows KH"]:
        """The cache in pieces of the rows of one copy, all layers; no copy of it."""
        return pages.reshape(-1, self.rows, pages.shape[-2] * pages.shape[-1])

    def pieces(self, tables: Ref, sequence: Scalar, first: Scalar, stop: Scalar) -> Iterator[Scalar]:
        """Which pieces hold the tile of tokens from `first` on, the last of them again for those past `stop`.

        The table is read as they are asked for.
        """
        for start in range(0, self.tile, self.rows):
            token = lax.min(first + start, stop - 1)
            block = tables[sequence, lax.div(token, jnp.int32(self.block_size))]
            if self.rows != self.block_size:
                inside = lax.div(lax.rem(token, jnp.int32(self.block_size)), jnp.int32(self.rows))
                block = block * (self.block_size // self.rows) + inside
            yield block

    def load(
        self,
        source: Ref,
        pieces: Iterable[Scalar],
        heads: Scalar,
        memory: Ref,
        at: Scalar,
        full: Ref,
        first: Scalar,
        low: Scalar,
        stop: Scalar,
    ) -> None:
        """Starts the copies into slot `at` of the tile of tokens from `first` on, for the heads' group `heads`.

        Where a copy's tokens are all before `low` or past `stop` they are nobody's, and are not read. Each arrives at
        `full` once, `copies` times together.
        """
        for index, piece in enumerate(pieces):
            token = first + index * self.rows
            wanted = (token < stop) & (token + self.rows > low)
            rows = pl.ds(index * self.rows, self.rows)
            for place, target in self._places(memory, at, heads, rows):
                pl.when(wanted)(partial(plgpu.copy_gmem_to_smem, source.at[piece, :, place], target, full))
                pl.when(~wanted)(partial(plgpu.barrier_arrive, full))

    def _places(self, memory: Ref, at: Scalar, heads: Scalar, rows: Any) -> list[tuple[Any, Ref]]:
        """Columns of the cache, and where they go in these rows of a slot."""
        first = heads * (self.heads * self.head_dim)
        if self.whole_rows:
            return [(pl.ds(first, self.panels * PANEL), memory.at[at, rows])]
        view = tile_views(memory)[0]
        starts = [h * self.head_dim + p * PANEL for h in range(self.heads) for p in range(self.head_panels)]
        return [(pl.ds(first + start, PANEL), view.at[at, i, rows]) for i, start in enumerate(starts)]
