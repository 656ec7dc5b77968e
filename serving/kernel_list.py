"""The kernels and shapes that `jpaged compile` compiles: a table, to which a kernel is added by a few lines."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
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
    pending: wgmma groups that a kernel keeps in flight where it frees shared memory (`Sass.findings`), by its name.
    """

    name: str
    build: Callable[[], Program]
    flops: float
    bytes: float | None = None
    pending: Mapping[str, int] = MappingProxyType({})


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
    LLAMA_3_8B,
    Shape("32-of-4", 1, 8192, 32, 4, 128),
    Shape("multi-head", 1, 8192, 32, 32, 128),
    Shape("head-64", 1, 8192, 32, 8, 64),
    Shape("head-256", 1, 8192, 16, 8, 256),
    Shape("smollm2", 1, 8192, 9, 3, 64),
)


def kernel_list() -> list[Entry]:
    """All entries, in the order of the printed table."""
    return [
        *flash_entries(LLAMA_3_8B, "causal"),
        *flash_entries(GPT_2, "causal"),
        *(decode_entry(shape) for shape in PAGED),
        *(decode_entry(shape, *sizes) for shape in (LLAMA_3_8B, GPT_2) for sizes in ((64, 2048), (1, 65536))),
        *(decode_entry(LLAMA_3_8B, block_size=block_size) for block_size in (32, 64, 128, 256)),
        decode_entry(LLAMA_3_8B, shared=4096),
        *(prefill_entry(shape) for shape in PAGED),
        *(prefill_entry(LLAMA_3_8B, block_size=block_size) for block_size in (32, 64, 128, 256)),
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
    "window-lengths": lambda shape: FLASH_OPTIONS["window"](shape) | FLASH_OPTIONS["lengths"](shape),
    "segments": lambda shape: {"is_causal": True, "segment_ids": jnp.zeros((shape.B, shape.length), jnp.int32)},
    "block-mask": lambda shape: {"block_mask": BlockMask.butterfly(shape.length, shape.length)},
    "dropout": lambda shape: {"dropout_rate": 0.1, "dropout_rng": jax.random.key(0)},
    "segments-dropout": lambda shape: FLASH_OPTIONS["segments"](shape) | FLASH_OPTIONS["dropout"](shape),
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
    # Fused, a warpgroup hands dS over while its dV and dK, of two groups for 64 columns, are in flight.
    pending = {"flash_backward_dk_dv_dq": shape.H // 32}
    yield Entry(f"flash-backward {shape.name} {name}", build_backward, 2.5 * flops, pending=pending)


def _pairs(shape: Shape, options: dict[str, Any]) -> float:
    """How many queries and keys of a head meet, where neither lengths nor segments hide any."""
    length = shape.length
    if "block_mask" in options:
        return length**2 * float(options["block_mask"].density)
    if "is_causal" not in options:
        return length**2
    seen = options.get("local_window_size", (length - 1, 0))[0] + 1  # by the last row
    return seen * length - seen * (seen - 1) / 2


def decode_entry(
    shape: Shape, sequences: int = 64, context: int = 8192, *, block_size: int = 16, shared: int = 0
) -> Entry:
    """One new token of each of so many sequences, whose contexts have so many tokens in common."""
    name = f"paged-decode {shape.name} {sequences}x{context} block-{block_size}" + f" shared-{shared}" * bool(shared)
    return _paged_entry(name, shape, sequences, context, 1, block_size, shared)


def prefill_entry(shape: Shape, *, block_size: int = 16) -> Entry:
    """The 512 last tokens of four sequences."""
    return _paged_entry(f"paged-prefill {shape.name} 4x8192 block-{block_size}", shape, 4, 8192, 512, block_size, 0)


def _paged_entry(
    name: str, shape: Shape, sequences: int, context: int, new: int, block_size: int, shared: int
) -> Entry:
    """Attention of the sequences' last tokens through block tables, in one of two layers."""
    N, K, H = shape.N, shape.K, shape.H
    blocks = context // block_size
    pages = jax.ShapeDtypeStruct((2, sequences * blocks, block_size, K, H), jnp.bfloat16)
    query = jax.ShapeDtypeStruct((sequences * new, N, H), jnp.bfloat16)
    row = (sequences,)
    sizes = ((sequences, blocks), row, (sequences + 1,), (sequences * new,), ())  # the batch's fields
    integers = [jax.ShapeDtypeStruct(size, jnp.int32) for size in (*sizes, *[row] * bool(shared))]

    def attend(query, keys, values, layer, *integers):
        shared_prefixes = integers[5] if shared else None
        batch = PagedBatch(*integers[:5], max_query_len=new, shared_prefix_lens=shared_prefixes)
        return paged_attention(query, KVCache(keys, values), batch, layer, implementation="mosaic")

    arguments = (query, pages, pages, jax.ShapeDtypeStruct((), jnp.int32), *integers)
    pairs = sequences * (new * context - new * (new - 1) / 2)
    tokens = sequences * (context - shared) + shared  # that are read
    moved = 2 * 2 * (K * H * tokens + N * H * sequences * new) + 4 * sequences * blocks
    return Entry(name, lambda: (attend, arguments), 4 * N * H * pairs, moved)


def cache_entries(name: str, tokens: int) -> Iterator[Entry]:
    """What a step of so many tokens does to the cache of Llama-3-8B: one layer's writes, copies of as many tokens."""
    N, K, H = LLAMA_3_8B.N, LLAMA_3_8B.K, LLAMA_3_8B.H
    L, num_blocks, block_size = 32, 4096, 16
    pages = jax.ShapeDtypeStruct((L, num_blocks, block_size, K, H), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((tokens, K, H), jnp.bfloat16)
    qkv = jax.ShapeDtypeStruct((tokens, K, N // K + 2, H), jnp.bfloat16)
    angle = jax.ShapeDtypeStruct((tokens, H // 2), jnp.float32)
    slots = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    pairs = jax.ShapeDtypeStruct((tokens // block_size, 2), jnp.int32)

    def write(keys, values, slots, layer, key, value):
        return write_kv(KVCache(keys, values), _writes_to(slots), layer, key, value, implementation="mosaic")

    def rotate_and_write(keys, values, slots, layer, qkv, cos, sin):
        cache, batch = KVCache(keys, values), _writes_to(slots)
        return rotate_and_write_kv(cache, batch, layer, qkv, cos, sin, implementation="mosaic")

    def copy(keys, values, pairs):
        return copy_blocks(KVCache(keys, values), pairs, implementation="mosaic")

    layer = jax.ShapeDtypeStruct((), jnp.int32)
    kv_bytes = 2 * 2 * K * H  # of a token, in one layer
    for operation, function, arguments, moved in (
        ("write-kv", write, (slots, layer, key, key), 2 * tokens * kv_bytes),
        (
            "rotate-and-write-kv",
            rotate_and_write,
            (slots, layer, qkv, angle, angle),
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
