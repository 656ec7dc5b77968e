"""The kernels and shapes that `jpaged compile` compiles: a table, to which a kernel is added by a few lines."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import (
    BlockMask,
    KVCache,
    PagedBatch,
    copy_blocks,
    flash_attention,
    paged_attention,
    rotate_and_write_kv,
    write_kv,
)

Program = tuple[Callable, tuple]  # a function, and pytrees of arrays or of their shapes as its arguments


@dataclass(frozen=True)
class Entry:
    """One program. `build` is called where the GPU's mesh is in force.

    flops: of its matmuls. bytes: that device memory must move; None: the arguments and the results, each once.
    pending: wgmma groups that it keeps in flight where it frees shared memory (`Sass.findings`).
    """

    name: str
    build: Callable[[], Program]
    flops: float
    bytes: float | None = None
    pending: int = 0


@dataclass(frozen=True)
class Shape:
    """B sequences of `length` tokens, N query heads and K key and value heads of H."""

    name: str
    B: int
    length: int
    N: int
    K: int
    H: int


LLAMA_3_8B = Shape("llama-3-8b", 1, 8192, 32, 8, 128)
GPT_2 = Shape("gpt-2", 8, 1024, 12, 12, 64)
HEAD_DIMS = tuple(Shape(f"head-{H}", 4, 4096, 2048 // H, 2048 // H, H) for H in (64, 128, 256))
PAGED = (
    Shape("llama-3-8b", 64, 8192, 32, 8, 128),
    Shape("32-of-4", 64, 8192, 32, 4, 128),
    Shape("multi-head", 64, 8192, 32, 32, 128),
    Shape("head-64", 64, 8192, 32, 8, 64),
    Shape("head-256", 64, 8192, 16, 8, 256),
    Shape("smollm2", 64, 8192, 9, 3, 64),
)


def kernel_list() -> list[Entry]:
    """All entries, in the order of the printed table."""
    return [
        *flash_entries(LLAMA_3_8B, "causal"),
        *flash_entries(GPT_2, "causal"),
        *(decode_entry(shape, *sizes) for shape in (LLAMA_3_8B, GPT_2) for sizes in ((64, 2048), (1, 65536))),
        *(paged_entry(shape, new, 16) for shape in PAGED for new in (1, 512)),
        *(paged_entry(PAGED[0], new, block_size) for new in (1, 512) for block_size in (32, 64, 128, 256)),
        *cache_entries("decode", tokens=64),
        *cache_entries("prefill", tokens=2048),
        *(entry for shape in HEAD_DIMS for name in FLASH_OPTIONS for entry in flash_entries(shape, name)),
    ]


# The options of `flash_attention`, by what they ask for.
FLASH_OPTIONS: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "full": lambda shape: {},
    "causal": lambda shape: {"is_causal": True},
    "window": lambda shape: {"is_causal": True, "local_window_size": (shape.length // 4, 0)},
    "soft-cap": lambda shape: {"is_causal": True, "logits_soft_cap": 30.0},
    "lengths": lambda shape: {"key_value_seq_lengths": jnp.full(shape.B, shape.length, jnp.int32)},
    "segments": lambda shape: {"is_causal": True, "segment_ids": jnp.zeros((shape.B, shape.length), jnp.int32)},
    "block-mask": lambda shape: {"block_mask": BlockMask.butterfly(shape.length, shape.length)},
    "dropout": lambda shape: {"dropout_rate": 0.1, "dropout_rng": jax.random.key(0)},
}


def flash_entries(shape: Shape, name: str) -> Iterator[Entry]:
    """Flash attention with the options of that name, forward and backward."""
    options = FLASH_OPTIONS[name](shape)
    arrays = {key: value for key, value in options.items() if isinstance(value, jax.Array | BlockMask)}
    static = {key: value for key, value in options.items() if key not in arrays}
    query = jax.ShapeDtypeStruct((shape.B, shape.length, shape.N, shape.H), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((shape.B, shape.length, shape.K, shape.H), jnp.bfloat16)

    def forward(query, key, value, arrays):
        return flash_attention(query, key, value, implementation="mosaic", **arrays, **static)

    def build_backward() -> Program:
        def saved(query, key, value, arrays):  # the gradient's function is a pytree of what forward saves for it
            return jax.vjp(lambda q, k, v: forward(q, k, v, arrays), query, key, value)[1]

        return lambda gradient, dout: gradient(dout), (jax.eval_shape(saved, query, key, key, arrays), query)

    flops = 4 * shape.B * shape.N * shape.H * _pairs(shape, options)
    yield Entry(f"flash-forward {shape.name} {name}", lambda: (forward, (query, key, key, arrays)), flops)
    # Five matmuls (FlashAttention-2, arXiv 2307.08691, section 4.1), where forward has two.
    yield Entry(f"flash-backward {shape.name} {name}", build_backward, 2.5 * flops)


def _pairs(shape: Shape, options: dict[str, Any]) -> float:
    """How many queries and keys of a head meet, where neither lengths nor segments hide any."""
    length = shape.length
    if "block_mask" in options:
        return length**2 * float(options["block_mask"].density)
    if "is_causal" not in options:
        return length**2
    seen = options.get("local_window_size", (length - 1, 0))[0] + 1  # by the last row
    return seen * length - seen * (seen - 1) / 2


def paged_entry(shape: Shape, new: int, block_size: int) -> Entry:
    """Attention of the `new` last tokens of B sequences through block tables: decode, if it is one, else prefill."""
    B, length = shape.B if new == 1 else 4, shape.length
    pages = jax.ShapeDtypeStruct((2, shape.B * length // block_size, block_size, shape.K, shape.H), jnp.bfloat16)
    integers = [
        jax.ShapeDtypeStruct(sizes, jnp.int32) for sizes in ((B, length // block_size), (B,), (B + 1,), (B * new,), ())
    ]
    query = jax.ShapeDtypeStruct((B * new, shape.N, shape.H), jnp.bfloat16)

    def attend(query, keys, values, *integers):
        batch = PagedBatch(*integers, max_query_len=new)
        return paged_attention(query, KVCache(keys, values), batch, 0, implementation="mosaic")

    pairs = new * length - new * (new - 1) / 2
    moved = 2 * B * shape.H * (2 * shape.K * length + 2 * shape.N * new)
    return Entry(
        f"{'paged-decode' if new == 1 else 'paged-prefill'} {shape.name} block-{block_size}",
        lambda: (attend, (query, pages, pages, *integers)),
        flops=4 * B * shape.N * shape.H * pairs,
        bytes=moved,
    )


def decode_entry(shape: Shape, sequences: int, context: int) -> Entry:
    """One token of each of so many sequences attends to its context, in one layer's blocks of 16."""
    N, K, H = shape.N, shape.K, shape.H
    blocks = context // 16
    pages = jax.ShapeDtypeStruct((2, sequences * blocks, 16, K, H), jnp.bfloat16)
    query = jax.ShapeDtypeStruct((sequences, N, H), jnp.bfloat16)
    tables = jax.ShapeDtypeStruct((sequences, blocks), jnp.int32)
    lengths = jax.ShapeDtypeStruct((sequences,), jnp.int32)

    def decode(query, keys, values, tables, lengths, layer):
        starts = jnp.arange(sequences + 1, dtype=jnp.int32)
        batch = PagedBatch(tables, lengths, starts, -jnp.ones_like(lengths), starts[-1], max_query_len=1)
        return paged_attention(query, KVCache(keys, values), batch, layer, implementation="mosaic")

    arguments = (query, pages, pages, tables, lengths, jax.ShapeDtypeStruct((), jnp.int32))
    pairs = sequences * context
    moved = 2 * 2 * (K * H * pairs + N * H * sequences) + 4 * sequences * blocks
    name = f"paged-decode {shape.name} {sequences}x{context}"
    return Entry(name, lambda: (decode, arguments), 4 * N * H * pairs, moved)


def cache_entries(name: str, tokens: int) -> Iterator[Entry]:
    """What a step of so many tokens does to the cache of Llama-3-8B: one layer's writes, copies of as many tokens."""
    N, K, H = LLAMA_3_8B.N, LLAMA_3_8B.K, LLAMA_3_8B.H
    L, num_blocks, block_size = 32, 4096, 16
    pages = jax.ShapeDtypeStruct((L, num_blocks, block_size, K, H), jnp.bfloat16)
    query, key = (jax.ShapeDtypeStruct((tokens, heads, H), jnp.bfloat16) for heads in (N, K))
    angle = jax.ShapeDtypeStruct((tokens, H // 2), jnp.float32)
    slots = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    pairs = jax.ShapeDtypeStruct((tokens // block_size, 2), jnp.int32)

    def write(keys, values, slots, layer, key, value):
        return write_kv(KVCache(keys, values), _writes_to(slots), layer, key, value, implementation="mosaic")

    def rotate_and_write(keys, values, slots, layer, query, key, value, cos, sin):
        cache, batch = KVCache(keys, values), _writes_to(slots)
        return rotate_and_write_kv(cache, batch, layer, query, key, value, cos, sin, implementation="mosaic")

    def copy(keys, values, pairs):
        return copy_blocks(KVCache(keys, values), pairs, implementation="mosaic")

    layer = jax.ShapeDtypeStruct((), jnp.int32)
    kv_bytes = 2 * 2 * K * H  # of a token, in one layer
    for operation, function, arguments, moved in (
        ("write-kv", write, (slots, layer, key, key), 2 * tokens * kv_bytes),
        (
            "rotate-and-write-kv",
            rotate_and_write,
            (slots, layer, query, key, key, angle, angle),
            tokens * (2 * kv_bytes + 2 * 2 * N * H + 4 * H),
        ),
        ("copy-blocks", copy, (pairs,), 2 * tokens * kv_bytes * L),
    ):
        program = jax.jit(function, donate_argnums=(0, 1)), (pages, pages, *arguments)
        yield Entry(f"{operation} llama-3-8b {name}", lambda program=program: program, 0.0, moved)


def _writes_to(slots: jax.Array) -> PagedBatch:
    """A batch of which only the slots matter."""
    none = jnp.zeros(1, jnp.int32)
    return PagedBatch(none[:, None], none, jnp.zeros(2, jnp.int32), slots, none[0], max_query_len=1)
