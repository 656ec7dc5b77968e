"""Copies, writes and swaps of KV cache blocks, in GB/s, at block sizes from 8 to 256.

    python benchmarks/cache_ops.py [--block-sizes 8,16,32,64,128,256] [--tokens 1024] [--json FILE]

copy: blocks of so many tokens in all, batched (one call of `copy_blocks`) against one by one (a call a block), the
ablation of arXiv 2309.06180. write: so many new tokens of four layers into slots drawn at random, alone and with the
rotation of queries and keys before it. swap: the same blocks out to pinned host memory and back in.
Bytes are those that must move: read and written for copies and writes, across the bus for swaps. Contestants take turns
in each repeat, and each figure is the median over repeats. On a GPU the cache is Llama-3-8B's in bfloat16, and the
kernels for Hopper stand beside XLA's; on a CPU it is small and float32, to show that it works.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import ON_GPU, Figures

from pallas_kernels import HostPool, KVCache, PagedBatch, copy_blocks, rotate_and_write_kv, write_kv

CALLS, REPEATS = 10, 7
LAYERS = 4  # that one program writes
Call = Callable[[KVCache], KVCache]  # the cache is donated


@dataclass(frozen=True)
class Model:
    L: int
    N: int
    K: int
    H: int
    dtype: Any

    @property
    def token_bytes(self) -> int:
        """Of keys and values of one layer."""
        return 2 * self.K * self.H * jnp.dtype(self.dtype).itemsize


def rates(cache: KVCache, calls: dict[str, Call], moved: int) -> dict[str, float]:
    """GB/s of each contestant. The calls of one turn follow each other through the cache that they hand on."""
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(REPEATS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                cache = call(cache)
            jax.block_until_ready(cache)
            if repeat:  # the first compiles
                seen[name].append((time.perf_counter() - start) / CALLS)
    return {name: moved / median(times) / 1e9 for name, times in seen.items()}


def copies(cache: KVCache, model: Model, tokens: int, implementations: list[Any]) -> dict[str, float]:
    count = tokens // cache.block_size
    ids = np.random.default_rng(0).permutation(cache.num_blocks)[: 2 * count].astype(np.int32)
    pairs = jnp.asarray(ids.reshape(count, 2))
    single = [pairs[i : i + 1] for i in range(count)]
    calls: dict[str, Call] = {}
    for implementation in implementations:
        copy = jax.jit(partial(copy_blocks, implementation=implementation), donate_argnums=0)

        def one_by_one(cache: KVCache, copy: Any = copy) -> KVCache:
            for pair in single:
                cache = copy(cache, pair)
            return cache

        calls[f"{implementation}, batched"] = lambda cache, copy=copy: copy(cache, pairs)
        calls[f"{implementation}, one by one"] = one_by_one
    return rates(cache, calls, 2 * count * cache.block_size * model.L * model.token_bytes)


def writes(cache: KVCache, model: Model, tokens: int, implementations: list[Any], rotate: bool) -> dict[str, float]:
    rng = np.random.default_rng(0)
    slots = jnp.asarray(rng.permutation(cache.num_blocks * cache.block_size)[:tokens], jnp.int32)
    none = jnp.zeros(1, jnp.int32)
    batch = PagedBatch(none[:, None], none, jnp.zeros(2, jnp.int32), slots, none[0], max_query_len=1)
    shape = (tokens, model.K, model.N // model.K + 2, model.H)
    layers = [jnp.asarray(rng.standard_normal(shape, np.float32), model.dtype) for _ in range(LAYERS)]
    new = [(qkv[:, :, 0], qkv[:, :, 1]) for qkv in layers]
    cos, sin = (jnp.asarray(rng.standard_normal((tokens, model.H // 2), np.float32)) for _ in range(2))
    calls: dict[str, Call] = {}
    for implementation in implementations:

        @partial(jax.jit, donate_argnums=0)
        def write(cache: KVCache, layers: Any, implementation: Any = implementation) -> tuple[list[Any], KVCache]:
            """Of several layers, as in a step of a model."""
            queries = []
            for layer, tokens in enumerate(layers):
                if rotate:
                    query, cache = rotate_and_write_kv(
                        cache, batch, layer, tokens, cos, sin, implementation=implementation
                    )
                    queries.append(query)
                else:
                    cache = write_kv(cache, batch, layer, *tokens, implementation=implementation)
            return queries, cache

        calls[str(implementation)] = lambda cache, write=write: write(cache, layers if rotate else new)[1]
    query_bytes = 2 * tokens * model.N * model.H * jnp.dtype(model.dtype).itemsize if rotate else 0
    return rates(cache, calls, LAYERS * (2 * tokens * model.token_bytes + query_bytes))


def swaps(cache: KVCache, model: Model, tokens: int) -> dict[str, float]:
    count = tokens // cache.block_size
    ids = np.arange(count, dtype=np.int32)
    pairs = np.stack([np.random.default_rng(0).permutation(cache.num_blocks)[:count].astype(np.int32), ids], axis=1)
    pool = HostPool(count)

    def out(cache: KVCache) -> KVCache:
        pool.store(cache, pairs)
        jax.block_until_ready(pool.blocks)
        return cache

    calls: dict[str, Call] = {"out": out, "in": lambda cache: pool.load(cache, pairs[:, ::-1])}
    return rates(cache, calls, count * cache.block_size * model.L * model.token_bytes)


def measure(
    model: Model, block_size: int, num_tokens: int, tokens: int, implementations: list[Any], figures: Figures
) -> None:
    def cache() -> KVCache:
        return KVCache.create(
            num_layers=model.L,
            num_blocks=num_tokens // block_size,
            block_size=block_size,
            num_kv_heads=model.K,
            head_dim=model.H,
            dtype=model.dtype,
        )

    operations: dict[str, Callable[[], dict[str, float]]] = {
        "copy": lambda: copies(cache(), model, tokens, implementations),
        "write": lambda: writes(cache(), model, tokens, implementations, rotate=False),
        "rotate and write": lambda: writes(cache(), model, tokens, implementations, rotate=True),
        "swap": lambda: swaps(cache(), model, tokens),
    }
    for operation, rates_of in operations.items():
        found = rates_of()
        first = next(iter(found.values()))
        for name, rate in found.items():
            row = {"block size": block_size, "contestant": name, "GB/s": rate, "ratio to the first": rate / first}
            figures.add(operation, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block-sizes", default="8,16,32,64,128,256")
    parser.add_argument("--tokens", type=int, default=1024 if ON_GPU else 256, help="copied, written and swapped")
    parser.add_argument("--json", type=Path, help="save all figures there")
    arguments = parser.parse_args()
    model = Model(32, 32, 8, 128, jnp.bfloat16) if ON_GPU else Model(4, 9, 3, 64, jnp.float32)
    num_tokens = 65_536 if ON_GPU else 4_096
    figures = Figures(arguments.json)
    for block_size in map(int, arguments.block_sizes.split(",")):
        measure(model, block_size, num_tokens, arguments.tokens, ["mosaic", "xla"] if ON_GPU else ["xla"], figures)


if __name__ == "__main__":
    main()
