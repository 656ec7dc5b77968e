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
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import DTYPE, ON_GPU, Call, Figures, compile_all, copy_bandwidth, seconds

from pallas_kernels import KVCache, PagedBatch, flash_attention, paged_attention

CHAINED = 10 if ON_GPU else 2


@dataclass(frozen=True)
class Problem:
    """B sequences with `new` tokens each, of a context of `context`."""

    B: int
    new: int
    context: int
    N: int = 32
    K: int = 8
    H: int = 128
    block_size: int = 16

    def arguments(self) -> tuple[jax.Array, KVCache, PagedBatch]:
        """Random queries, keys and values; tables shuffled over a pool of exactly the blocks needed."""
        blocks = -(-self.context // self.block_size)
        tables = np.random.default_rng(0).permutation(self.B * blocks).astype(np.int32).reshape(self.B, blocks)
        shape = (1, self.B * blocks, self.block_size, self.K, self.H)
        keys, values = (jax.random.normal(jax.random.key(i), shape, DTYPE) for i in range(2))
        batch = PagedBatch(
            block_tables=jnp.asarray(tables),
            context_lens=jnp.full(self.B, self.context, jnp.int32),
            query_starts=self.new * jnp.arange(self.B + 1, dtype=jnp.int32),
            slot_mapping=jnp.full(self.B * self.new, -1, jnp.int32),
            num_decodes=jnp.int32(self.B if self.new == 1 else 0),
            max_query_len=self.new,
        )
        query = jax.random.normal(jax.random.key(2), (self.B * self.new, self.N, self.H), DTYPE)
        return query, KVCache(keys, values), batch

    @property
    def cache_bytes(self) -> int:
        return 2 * self.B * self.context * self.K * self.H * jnp.dtype(DTYPE).itemsize

    @property
    def flops(self) -> float:
        """Of causal attention."""
        pairs = self.new * (self.context - self.new) + self.new * (self.new + 1) / 2
        return 4 * self.B * self.N * self.H * pairs


def chained(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """CHAINED calls in one program, each with the output of the one before as its query."""

    def run(query: jax.Array, *others: Any) -> jax.Array:
        for _ in range(CHAINED):
            query = attend(query, *others)
        return query

    return run


paged = chained(lambda query, cache, batch: paged_attention(query, cache, batch, 0))


def compile_problems(problems: list[Problem]) -> dict[Problem, tuple[Callable, Callable]]:
    """What makes the arguments of each, and what attends."""
    programs: dict[tuple[Problem, bool], tuple[Callable, tuple]] = {}
    for problem in problems:
        programs[problem, False] = problem.arguments, ()
        programs[problem, True] = paged, jax.eval_shape(problem.arguments)
    compiled = compile_all(programs)
    return {p: (compiled[p, False], compiled[p, True]) for p in problems if (p, True) in compiled}


def decode(figures: Figures) -> None:
    """Share of the bandwidth of a copy, over batch and length."""
    shapes = [(64, 8192), (64, 1024), (64, 512), (16, 8192), (16, 1024), (1, 65536), (1, 8192), (1, 512)]
    problems = [Problem(B, 1, length, K=K) for K in (4, 8, 32) for B, length in (shapes if ON_GPU else [(2, 128)])]
    compiled = compile_problems(problems)
    bandwidth = copy_bandwidth()
    for problem, (make, attend) in compiled.items():
        time = seconds({0: partial(attend, *make())})[0] / CHAINED
        rate = problem.cache_bytes / time
        figures.add(
            "decode",
            {"batch": problem.B, "length": problem.context, "kv heads": problem.K}
            | {"us": time * 1e6, "GB/s": rate / 1e9, "share of a copy": rate / bandwidth},
        )


def blocks(figures: Figures) -> None:
    """The same decode through blocks of each size, and contiguous."""
    B, length = (64, 4096) if ON_GPU else (2, 128)
    compiled = compile_problems([Problem(B, 1, length, block_size=size) for size in (16, 8, 32, 64, 128, 256, length)])
    found = seconds({p.block_size: partial(attend, *make()) for p, (make, attend) in compiled.items()})
    for size, time in found.items():
        name = "contiguous" if size == length else size
        figures.add("blocks", {"block size": name, "us": time / CHAINED * 1e6, "of contiguous": time / found[length]})


def prefill(figures: Figures) -> None:
    """Chunks of new tokens against cached prefixes, beside dense causal attention of the same scores."""
    shapes = (
        [(8, 512, 3584), (1, 2048, 30720), (2, 2048, 6144), (4, 2048, 0), (1, 8192, 0)] if ON_GPU else [(2, 64, 64)]
    )
    problems = {Problem(B, new, new + prefix): prefix for B, new, prefix in shapes}
    compiled = compile_problems(list(problems))
    dense = {}
    for p, prefix in problems.items():
        heads = [jax.ShapeDtypeStruct((p.B, T, heads, p.H), DTYPE) for T, heads in ((p.new, p.N), (p.context, p.K))]
        attend = chained(partial(flash_attention, is_causal=True, query_offset=prefix))
        dense[p] = attend, (heads[0], heads[1], heads[1])
    dense = compile_all(dense)
    for p, (make, attend) in compiled.items():
        query, cache, batch = make()
        key, value = (pages.reshape(p.B, p.context, p.K, p.H) for pages in (cache.keys, cache.values))
        calls = {
            "paged": partial(attend, query, cache, batch),
            "flash": partial(dense[p], query.reshape(p.B, p.new, p.N, p.H), key, value),
        }
        found = seconds(calls)
        figures.add(
            "prefill",
            {"sequences": p.B, "new": p.new, "prefix": p.context - p.new}
            | {f"{name} TFLOP/s": CHAINED * p.flops / time / 1e12 for name, time in found.items()}
            | {"paged / flash": found["flash"] / found["paged"]},
        )


def shared(figures: Figures) -> None:
    """Decode of sequences with a prefix in common and 256 tokens of their own, the prefix read once and by each."""
    for B, prefix in [(8, 1024), (64, 1024), (64, 4096)] if ON_GPU else [(16, 512)]:
        query, cache, batch = Problem(B, 1, prefix + 256).arguments()
        tables = batch.block_tables.at[:, : prefix // 16].set(batch.block_tables[0, : prefix // 16])
        alone = replace(batch, block_tables=tables)
        together = replace(alone, shared_prefix_lens=jnp.full(B, prefix, jnp.int32))
        attend = jax.jit(paged)
        calls = {"once": partial(attend, query, cache, together), "by each": partial(attend, query, cache, alone)}
        outputs = [np.asarray(call(), np.float32) for call in calls.values()]
        np.testing.assert_allclose(*outputs, rtol=2e-2, atol=2e-2)
        found = seconds(calls)
        figures.add(
            "shared",
            {"sequences": B, "prefix": prefix}
            | {f"{name} us": time / CHAINED * 1e6 for name, time in found.items()}
            | {"times as fast": found["by each"] / found["once"]},
        )


def gather(figures: Figures) -> None:
    """xla decode beside gathering the pages, batch 16, lengths 64 to 2,048 drawn at random, SmolLM2's heads."""
    contexts = np.random.default_rng(0).integers(64, 2049, 16).tolist()
    query, cache, batch = Problem(16, 1, 2048, 9, 3, 64).arguments()
    batch = replace(batch, context_lens=jnp.asarray(contexts, jnp.int32))

    @jax.jit
    def gathered(query, cache, batch):
        key, value = (pages[0, batch.block_tables].reshape(16, -1, 3, 64) for pages in (cache.keys, cache.values))
        lengths = batch.context_lens
        return jax.nn.dot_product_attention(query[:, None], key, value, key_value_seq_lengths=lengths)[:, 0]

    alone = jax.jit(partial(paged_attention, implementation="xla"))
    np.testing.assert_allclose(alone(query, cache, batch, 0), gathered(query, cache, batch), rtol=2e-2, atol=2e-2)
    calls: dict[str, Call] = {
        "xla": partial(alone, query, cache, batch, 0),
        "gather": partial(gathered, query, cache, batch),
    }
    found = seconds(calls)
    figures.add(
        "gather",
        {"tokens": sum(contexts)}
        | {f"{name} ms": time * 1e3 for name, time in found.items()}
        | {"times as fast": found["gather"] / found["xla"]},
    )


MEASUREMENTS = {"decode": decode, "blocks": blocks, "prefill": prefill, "shared": shared, "gather": gather}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default=",".join(MEASUREMENTS))
    parser.add_argument("--json", type=Path, help="save all figures there")
    arguments = parser.parse_args()
    names = arguments.what.split(",")
    if unknown := set(names) - MEASUREMENTS.keys():
        parser.error(f"--what: expected some of {', '.join(MEASUREMENTS)}, got {', '.join(sorted(unknown))}")
    figures = Figures(arguments.json)
    for name in names:
        MEASUREMENTS[name](figures)


if __name__ == "__main__":
    main()
