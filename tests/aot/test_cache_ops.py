"""The kernels that write and copy cache blocks, compiled for an H100: no spills, the cache in place, one launch."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import (
    KVCache,
    PagedBatch,
    aot,
    copy_blocks,
    gather_blocks,
    host_pool,
    rotate_and_write_kv,
    scatter_blocks,
    write_kv,
)

LLAMA_3_8B = (32, 4096, 16, 8, 128)
SHAPES = [
    LLAMA_3_8B,
    (30, 4096, 16, 3, 64),  # SmolLM2-135M
    (2, 4096, 1, 1, 16),
    (2, 512, 8, 40, 128),
    (2, 512, 256, 8, 256),
]
DTYPES: list[Any] = [jnp.bfloat16, jnp.float16, jnp.float32]
T, GROUP = 65, 4  # tokens, odd; query heads a kv head


def array(*shape, dtype: Any = jnp.bfloat16, sharding: Any = None) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def cache_of(shape, dtype: Any = jnp.bfloat16, sharding: Any = None):
    return KVCache(*(array(*shape, dtype=dtype, sharding=sharding) for _ in range(2)))


def batch_of(tokens):
    """Of which only the slots matter."""
    ints = partial(array, dtype=jnp.int32)
    return PagedBatch(ints(1, 1), ints(1), ints(2), ints(tokens), ints(), max_query_len=1)


def call_of(operation, shape, dtype, sharding: Any = None):
    """(function, arguments): the operation with the cache first."""
    *_, K, H = shape
    key = array(T, K, H, dtype=dtype, sharding=sharding)
    qkv = array(T, K, GROUP + 2, H, dtype=dtype, sharding=sharding)
    angle = array(T, H // 2, dtype=jnp.float32)
    layer = array(dtype=jnp.int32)
    return {
        "copy_blocks": (copy_blocks, (array(17, 2, dtype=jnp.int32),)),
        "write_kv": (write_kv, (batch_of(T), layer, key, key)),
        "rotate_and_write_kv": (rotate_and_write_kv, (batch_of(T), layer, qkv, angle, angle)),
    }[operation]


OPERATIONS = ["copy_blocks", "write_kv", "rotate_and_write_kv"]


def assert_in_place(report, shape, itemsize, devices=1):
    """That the program holds the cache once and copies it under none of the shapes that it takes in the kernels."""
    assert report.memory.alias_size_in_bytes >= 2 * math.prod(shape) * itemsize / devices
    assert report.memory.temp_size_in_bytes < 2**20
    L, P, block_size, K, H = shape
    K, slots = K // devices, P * block_size
    views = (L, P, block_size, K, H), (L, P, block_size * K * H), (L, slots, K, H), (L, slots, K * H)
    assert [report.copies(view) for view in views] == [0] * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_launch_without_faults_in_place(operation, shape, dtype):
    function, arguments = call_of(operation, shape, dtype)
    function = jax.jit(partial(function, implementation="mosaic"), donate_argnums=0)
    report = aot.compile(function, cache_of(shape, dtype), *arguments)
    assert [kernel.name for kernel in report.kernels] == [operation]
    assert report.faults() == []
    assert report.kernels[0].spill_stores == report.kernels[0].stack == 0
    assert len(report.operations("custom-call")) == 1
    assert report.operations("fusion") == []
    assert_in_place(report, shape, jnp.dtype(dtype).itemsize)


def test_none_is_mosaic_on_this_card():
    for operation in OPERATIONS:
        function, arguments = call_of(operation, LLAMA_3_8B, jnp.bfloat16)
        report = aot.compile(jax.jit(function, donate_argnums=0), cache_of(LLAMA_3_8B), *arguments)
        assert [kernel.name for kernel in report.kernels] == [operation]


@pytest.mark.parametrize("operation", ["write_kv", "rotate_and_write_kv"])
def test_in_place_inside_a_scan_over_the_layers(operation):
    function, (batch, _, *new) = call_of(operation, LLAMA_3_8B, jnp.bfloat16)

    @partial(jax.jit, donate_argnums=0)
    def step(cache, batch, *new):
        def layer(carry, index):
            cache, first = carry
            # A layer's keys come from the layer before: no write can be done ahead of time.
            result = function(cache, batch, index, first, *new[1:], implementation="mosaic")
            cache = result[1] if operation == "rotate_and_write_kv" else result
            return (cache, first + cache.keys[index, 0, 0, 0, 0]), None

        return jax.lax.scan(layer, (cache, new[0]), jnp.arange(32, dtype=jnp.int32))[0]

    report = aot.compile(step, cache_of(LLAMA_3_8B), batch, *new)
    assert report.faults() == []
    assert_in_place(report, LLAMA_3_8B, 2)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_eight_cards_each_work_on_their_own_heads(operation):
    mesh = aot.mesh("h100", (8,), ("model",))
    pages, heads = jax.P(None, None, None, "model"), jax.P(None, "model")
    on_cards = partial(jax.NamedSharding, mesh)
    function, arguments = call_of(operation, LLAMA_3_8B, jnp.bfloat16, on_cards(heads))
    specs = tuple(jax.tree.map(lambda x: jax.P() if x.sharding is None else x.sharding.spec, a) for a in arguments)
    out = (heads, pages) if operation == "rotate_and_write_kv" else pages
    sharded = jax.shard_map(
        partial(function, implementation="mosaic"), mesh=mesh, in_specs=(pages, *specs), out_specs=out, check_vma=False
    )
    cache = cache_of(LLAMA_3_8B, sharding=on_cards(pages))
    report = aot.compile(jax.jit(sharded, donate_argnums=0), cache, *arguments, devices=mesh)
    assert [kernel.name for kernel in report.kernels] == [operation]
    assert report.faults() == []
    assert not report.collectives()
    assert_in_place(report, LLAMA_3_8B, 2, devices=8)


def test_outside_of_shard_map_no_card_gathers_the_cache():
    """XLA cannot divide a kernel over cards, and so it does not get one."""
    mesh = aot.mesh("h100", (8,), ("model",))
    cache = cache_of(LLAMA_3_8B, sharding=jax.NamedSharding(mesh, jax.P(None, None, None, "model")))
    for operation in OPERATIONS:
        function, arguments = call_of(operation, LLAMA_3_8B, jnp.bfloat16)
        report = aot.compile(jax.jit(function, donate_argnums=0), cache, *arguments, devices=mesh)
        assert report.kernels == ()
        assert not report.collectives()
        assert report.memory.alias_size_in_bytes >= 2 * math.prod(LLAMA_3_8B) * 2 / 8


def test_gathers_and_scatters_of_xla_copy_no_cache():
    cache, ids = cache_of(LLAMA_3_8B), array(16, dtype=jnp.int32)
    report = aot.compile(gather_blocks, cache, ids)
    assert report.memory.temp_size_in_bytes < 2**20
    report = aot.compile(jax.jit(scatter_blocks, donate_argnums=0), cache, ids, array(16, 2, 32, 16, 8, 128))
    assert_in_place(report, LLAMA_3_8B, 2)


def test_eight_cards_swap_without_talking():
    """What `HostPool` runs on the device: each card's heads stay with it."""
    mesh = aot.mesh("h100", (8,), ("model",))
    heads = jax.NamedSharding(mesh, jax.P(None, None, None, "model"))
    cache, ids = cache_of(LLAMA_3_8B, sharding=heads), array(16, dtype=jnp.int32)
    blocks = [array(2, 32, 16, 8, 128, sharding=heads) for _ in range(16)]
    report = aot.compile(host_pool._gather, cache, ids, devices=mesh)
    assert not report.collectives()
    block_bytes = 2 * 32 * 16 * 8 * 128 * 2
    assert report.memory.output_size_in_bytes < 17 * block_bytes / 8
    report = aot.compile(host_pool._scatter, cache, ids, blocks, devices=mesh)
    assert not report.collectives()
    assert report.memory.alias_size_in_bytes >= 2 * math.prod(LLAMA_3_8B) * 2 / 8
    assert report.memory.temp_size_in_bytes < 17 * block_bytes / 8
