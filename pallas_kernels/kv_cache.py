"""The KV cache: the blocks of every layer in one array."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of L layers in P blocks (pages) of `block_size` tokens, K kv heads of dimension H each.

    Stacked over layers, so that a model can be one `lax.scan` over its layers. A block of one layer is
    contiguous. Which sequence owns which block is not known here: see `PagedBatch.block_tables`.

    >>> cache = KVCache.create(num_layers=2, num_blocks=8, block_size=16, num_kv_heads=4, head_dim=64)
    >>> cache.keys.shape, cache.block_size
    ((2, 8, 16, 4, 64), 16)
    """

    keys: Float[Array, "L P block_size K H"]
    values: Float[Array, "L P block_size K H"]

    @classmethod
    def create(
        cls,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: DTypeLike = jnp.float32,
    ) -> "KVCache":
        """An empty cache (zeros). Raises ValueError for a size below 1."""
        sizes = {
            "num_layers": num_layers,
            "num_blocks": num_blocks,
            "block_size": block_size,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"KVCache: {name} must be at least 1, got {size}")
        shape = tuple(sizes.values())
        return cls(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))

    @property
    def num_blocks(self) -> int:
        return self.keys.shape[1]

    @property
    def block_size(self) -> int:
        return self.keys.shape[2]

    @property
    def num_kv_heads(self) -> int:
        return self.keys.shape[3]

    @property
    def head_dim(self) -> int:
        return self.keys.shape[4]


def check_layer(function: str, cache: KVCache, layer: int | Array) -> None:
    """Raises ValueError for a layer that the cache does not have, where its number is known."""
    if isinstance(layer, int) and not 0 <= layer < cache.keys.shape[0]:
        raise ValueError(f"{function}: layer must be in [0, {cache.keys.shape[0]}), got {layer}")
