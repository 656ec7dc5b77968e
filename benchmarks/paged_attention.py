"""paged_attention's speed: decode over batch and length, block sizes, prefill, and what gathering the pages would cost.

    python benchmarks/paged_attention.py [--what decode,blocks,prefill,shared,gather] [--json FILE]

On a Hopper GPU: bf16, 32 query heads of 128. `decode` gives the share of the bandwidth that a copy of the same bytes
within the device's memory has in the same run. `blocks` is the paper's ablation (arXiv 2309.06180, section 7.1): the
same decode through blocks of each size, and over contiguous keys and values (one block a sequence). `prefill` gives
TFLOP/s of chunks against cached prefixes, beside `flash_attention` of the same shape. `shared` is a decode of sequences
that share a prefix, read once for all and once for each. `gather` compares the xla implementation with gathering each
sequence's pages and calling `jax.nn.dot_product_attention`, at SmolLM2's shape.

Each figure is the median over repeats of the mean of several calls; contestants take turns in each repeat. A call of
paged attention, or of what it is compared with, is one of ten in a row in one program, each on the output of the one
before, as in a model of ten layers. On a CPU it runs the xla kernels at small size.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from pallas_kernels import KVCache, PagedBatch, flash_attention, paged_attention

ON_GPU = jax.default_backend() == "gpu"
DTYPE = jnp.bfloat16 if ON_GPU else jnp.float32
REPEATS = 5
CHAINED = 10 if ON_GPU else 2

Call = Callable[[], Any]
Row = dict[str, Any]


def seconds(calls: dict[str, Call], each: int = 10) -> dict[str, float]:
    """Of each call, the median over repeats of the mean of `each` in a row."""
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            start = time.perf_counter()
            results = [call() for _ in range(each)]
            jax.block_until_ready(results[-1])
            times[name].append((time.perf_counter() - start) / each)
    return {name: median(seen) for name, seen in times.items()}


def problem(
    new: list[int], contexts: list[int], N: int, K: int, H: int, block_size: int
) -> tuple[jax.Array, KVCache, PagedBatch]:
    """Random queries, keys and values; tables shuffled over a pool of exactly the blocks needed."""
    rng = np.random.default_rng(0)
    counts = [-(-context // block_size) for context in contexts]
    order = rng.permutation(sum(counts)).astype(np.int32)
    tables = np.zeros((len(contexts), max(counts)), np.int32)
    for row, (start, count) in enumerate(zip(np.cumsum([0, *counts]), counts, strict=False)):
        tables[row, :count] = order[start : start + count]
    shape = (1, sum(counts), block_size, K, H)
    keys, values = (jax.random.normal(jax.random.key(i), shape, DTYPE) for i in range(2))
    batch = PagedBatch(
        block_tables=jnp.asarray(tables),
        context_lens=jnp.asarray(contexts, jnp.int32),
        query_starts=jnp.asarray(np.cumsum([0, *new]), jnp.int32),
        slot_mapping=jnp.full(sum(new), -1, jnp.int32),
        num_decodes=jnp.int32(sum(n == 1 for n in new)),
        max_query_len=max(new),
    )
    return jax.random.normal(jax.random.key(2), (sum(new), N, H), DTYPE), KVCache(keys, values), batch


def chained(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """CHAINED calls in one program, each with the output of the one before as its query."""

    @jax.jit
    def run(query: jax.Array, *others: Any) -> jax.Array:
        for _ in range(CHAINED):
            query = attend(query, *others)
        return query

    return run


def attention(query: jax.Array, cache: KVCache, batch: PagedBatch) -> Call:
    return partial(chained(lambda query, cache, batch: paged_attention(query, cache, batch, 0)), query, cache, batch)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy far larger than the caches."""
    x = jnp.ones(2**30 if ON_GPU else 2**22, jnp.bfloat16)
    return 2 * x.nbytes / seconds({"copy": partial(jax.jit(lambda x: x + 1), x)}, each=4)["copy"]


def decode() -> list[Row]:
    """Share of the bandwidth of a copy, over batch and length."""
    rows = []
    bandwidth = copy_bandwidth()
    shapes = [(1, 8192), (1, 65536), (16, 1024), (16, 8192), (64, 512), (64, 1024), (64, 8192)]
    if not ON_GPU:
        shapes = [(4, 256)]
    for B, length, K in [(*shape, K) for K in (4, 8, 32) for shape in shapes]:
        query, cache, batch = problem([1] * B, [length] * B, 32, K, 128, 16)
        size = cache.keys.nbytes + cache.values.nbytes
        time = seconds({"decode": attention(query, cache, batch)}, each=3)["decode"] / CHAINED
        rows.append(
            {
                "batch": B,
                "length": length,
                "kv heads": K,
                "us": time * 1e6,
                "GB/s": size / time / 1e9,
                "share of a copy": size / time / bandwidth,
            }
        )
    return rows


def blocks() -> list[Row]:
    """The same decode through blocks of each size, and contiguous."""
    B, length = (64, 4096) if ON_GPU else (4, 256)
    calls = {}
    for size in (8, 16, 32, 64, 128, 256, length):
        name = "contiguous" if size == length else str(size)
        calls[name] = attention(*problem([1] * B, [length] * B, 32, 8, 128, size))
    found = seconds(calls, each=3)
    return [
        {"block size": name, "us": t / CHAINED * 1e6, "of contiguous": t / found["contiguous"]}
        for name, t in found.items()
    ]


def prefill() -> list[Row]:
    """Chunks of new tokens against cached prefixes, beside dense causal attention of the same scores."""
    rows = []
    shapes = [(1, 8192, 0), (4, 2048, 0), (8, 512, 3584), (2, 2048, 6144)] if ON_GPU else [(2, 64, 64)]
    for B, new, prefix in shapes:
        context = new + prefix
        query, cache, batch = problem([new] * B, [context] * B, 32, 8, 128, 16)
        dense = query.reshape(B, new, 32, 128)
        key, value = (jax.random.normal(jax.random.key(i), (B, context, 8, 128), DTYPE) for i in range(2))
        flash = chained(partial(flash_attention, is_causal=True, query_offset=prefix))
        found = seconds({"paged": attention(query, cache, batch), "flash": partial(flash, dense, key, value)}, each=3)
        flops = CHAINED * 4 * B * 32 * 128 * (new * prefix + new * (new + 1) / 2)
        rows.append(
            {"sequences": B, "new": new, "prefix": prefix}
            | {f"{name} TFLOP/s": flops / t / 1e12 for name, t in found.items()}
            | {"paged / flash": found["flash"] / found["paged"]}
        )
    return rows


def shared() -> list[Row]:
    """Decode of sequences with a prefix in common and 256 tokens of their own, the prefix read once and by each."""
    rows = []
    for B, prefix in [(8, 1024), (64, 1024), (64, 4096)] if ON_GPU else [(16, 512)]:
        query, cache, batch = problem([1] * B, [prefix + 256] * B, 32, 8, 128, 16)
        tables = batch.block_tables.at[:, : prefix // 16].set(batch.block_tables[0, : prefix // 16])
        alone = replace(batch, block_tables=tables)
        together = replace(alone, shared_prefix_lens=jnp.full(B, prefix, jnp.int32))
        calls = {"once": attention(query, cache, together), "by each": attention(query, cache, alone)}
        outputs = [np.asarray(call(), np.float32) for call in calls.values()]
        np.testing.assert_allclose(*outputs, rtol=2e-2, atol=2e-2)
        found = seconds(calls)
        rows.append(
            {"sequences": B, "prefix": prefix}
            | {f"{name} us": t * 1e6 for name, t in found.items()}
            | {"times as fast": found["by each"] / found["once"]}
        )
    return rows


def gather() -> list[Row]:
    """xla decode beside gathering the pages, batch 16, lengths 64 to 2,048 drawn at random, SmolLM2's heads."""
    contexts = np.random.default_rng(0).integers(64, 2049, 16).tolist()
    query, cache, batch = problem([1] * 16, contexts, 9, 3, 64, 16)

    @jax.jit
    def gathered(query, cache, batch):
        key, value = (pages[0, batch.block_tables].reshape(16, -1, 3, 64) for pages in (cache.keys, cache.values))
        lengths = batch.context_lens
        return jax.nn.dot_product_attention(query[:, None], key, value, key_value_seq_lengths=lengths)[:, 0]

    paged = jax.jit(partial(paged_attention, implementation="xla"))
    np.testing.assert_allclose(paged(query, cache, batch, 0), gathered(query, cache, batch), rtol=2e-2, atol=2e-2)
    found = seconds({"xla": partial(paged, query, cache, batch, 0), "gather": partial(gathered, query, cache, batch)})
    return [
        {"tokens": sum(contexts)}
        | {f"{name} ms": t * 1e3 for name, t in found.items()}
        | {"times as fast": found["gather"] / found["xla"]}
    ]


MEASUREMENTS = {"decode": decode, "blocks": blocks, "prefill": prefill, "shared": shared, "gather": gather}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default=",".join(MEASUREMENTS))
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}")
    figures = {}
    for name in arguments.what.split(","):
        rows = figures[name] = MEASUREMENTS[name]()
        table = Table(*rows[0], title=f"{name}: {(MEASUREMENTS[name].__doc__ or '').strip()}")
        for row in rows:
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
        Console(width=110).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": device, "jax": jax.__version__, **figures}, indent=1))


if __name__ == "__main__":
    main()
