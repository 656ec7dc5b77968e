"""paged_attention compiled for H100s that are not there: machine code, the cache in place, and a whole decode step."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from models import Llama, LlamaConfig
from models import llama as llama_module
from pallas_kernels import KVCache, PagedBatch, aot, kv_head_sharding, paged_attention, write_kv


@pytest.fixture(autouse=True)
def no_annotation_checks() -> Iterator[None]:
    """For descriptions of arrays stand in their places."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


LLAMA_3_8B = LlamaConfig(
    vocab_size=128_256,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    d_ff=14_336,
    max_len=8192,
)
BATCH, BLOCKS, BLOCK_SIZE = 64, 4096, 16


def struct(*shape: int, dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def batch_of(
    rows: int, max_blocks: int, tokens: int | None = None, max_query_len: int = 1, shares: bool = False
) -> PagedBatch:
    tokens = tokens or rows
    shapes = ((rows, max_blocks), (rows,), (rows + 1,), (tokens,), ())
    shared = struct(rows) if shares else None
    return PagedBatch(*(struct(*shape) for shape in shapes), max_query_len=max_query_len, shared_prefix_lens=shared)


def cache_of(
    layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: Any = jnp.bfloat16
) -> KVCache:
    pages = struct(layers, blocks, block_size, kv_heads, head_dim, dtype=dtype)
    return KVCache(pages, pages)


# What the list of `jpaged compile` does not have: fp16, windows, soft caps, padded head dims, wide groups.
@pytest.mark.parametrize(
    ("N", "K", "H", "block_size", "options"),
    [
        (32, 8, 128, 16, {"local_window_size": 1000, "logits_soft_cap": 30.0}),
        (32, 8, 128, 8, {}),
        (32, 8, 128, 48, {}),
        (32, 8, 64, 16, {"local_window_size": 1000}),
        (16, 1, 128, 16, {}),
        (32, 1, 256, 16, {}),
        (32, 4, 80, 16, {}),
        (8, 8, 192, 32, {"logits_soft_cap": 30.0}),
    ],
)
@pytest.mark.parametrize("new", [1, 512])
def test_kernels_compile_without_faults(N, K, H, block_size, options, new):
    def attend(query, cache, batch):
        return paged_attention(query, cache, batch, 0, **options, implementation="mosaic")

    cache = cache_of(1, 1024, block_size, K, H, dtype=jnp.float16)
    batch = batch_of(4, 256, 4 * new, new)
    report = aot.compile(attend, struct(4 * new, N, H, dtype=jnp.float16), cache, batch, gpu="h100")
    assert not report.faults()
    assert len(report.kernels) == (2 if new == 1 else 3)


@pytest.mark.parametrize(
    ("N", "K", "H", "block_size", "options"),
    [
        (32, 32, 128, 16, {}),
        (12, 12, 64, 16, {"logits_soft_cap": 30.0}),
        (9, 3, 64, 32, {}),
        (16, 1, 256, 16, {}),
        (32, 1, 128, 256, {}),
        (32, 4, 80, 16, {}),
    ],
)
def test_shared_prefixes_compile_without_faults(N, K, H, block_size, options):
    def attend(query, cache, batch):
        return paged_attention(query, cache, batch, 0, **options, implementation="mosaic")

    cache, batch = cache_of(1, 1024, block_size, K, H), batch_of(16, 256, shares=True)
    report = aot.compile(attend, struct(16, N, H, dtype=jnp.bfloat16), cache, batch, gpu="h100")
    assert not report.faults()
    assert len(report.kernels) == 3


@pytest.mark.parametrize("K", [16, 8, 2])
def test_eight_gpus_need_nothing_of_each_other(K):
    """Two kv heads each, one, and a fourth of one: a copy of it for each of the four that share it."""
    N, heads = 32, kv_head_sharding("x", 8, num_query_heads=32, num_kv_heads=K)
    mesh = aot.mesh("h100", (8,), ("x",))
    specs = (heads.tokens, heads.cache, P(), heads.tokens, heads.tokens)

    def attend(query, cache, batch, key, value):
        cache = write_kv(cache, batch, 1, key, value, implementation="mosaic")
        return paged_attention(query, cache, batch, 1, implementation="mosaic"), cache

    query, key = (struct(64, n, 128, dtype=jnp.bfloat16) for n in (N, K * heads.copies))
    arguments = query, cache_of(2, BLOCKS, BLOCK_SIZE, K * heads.copies, 128), batch_of(64, 512), key, key

    def placed(argument, spec):
        sharding = jax.NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), argument)

    sharded = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=(heads.tokens, heads.cache), check_vma=False)
    report = aot.compile(jax.jit(sharded, donate_argnums=1), *map(placed, arguments, specs), gpu="h100", devices=mesh)
    assert not report.faults()
    assert not report.collectives()
    local = (2, BLOCKS, BLOCK_SIZE, max(K // 8, 1), 128)
    assert f"bf16[{','.join(map(str, local))}]" in report.text
    assert report.copies(local) == 0


def test_a_table_beyond_2_to_the_31_elements():
    """No index into the cache is a 32-bit offset of elements: it is read as pieces of a block, in three dimensions."""
    cache = cache_of(32, 8192, 16, 8, 128)
    assert cache.keys.size > 2**31

    def attend(query, cache, batch):
        return paged_attention(query, cache, batch, 31, implementation="mosaic")

    report = aot.compile(attend, struct(64, 32, 128, dtype=jnp.bfloat16), cache, batch_of(64, 512), gpu="h100")
    assert not report.faults()
    assert report.copies(cache.keys.shape) == 0


def abstract_llama(config: LlamaConfig, scan_layers: bool) -> Any:
    return nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, scan_layers=scan_layers))


def decode_step(model, tokens, positions, cache, batch):
    hidden, cache = model.step(tokens, positions, cache, batch)
    return model.logits(hidden).argmax(-1), cache


def test_a_decode_step_of_llama_3_8b_writes_the_cache_in_place():
    cache = cache_of(32, BLOCKS, BLOCK_SIZE, 8, 128)
    # Not stacked: the compiler copies a layer's weights, 436 MB, out of the stack before it multiplies by them.
    arguments = abstract_llama(LLAMA_3_8B, scan_layers=False), struct(BATCH), struct(BATCH), cache, batch_of(BATCH, 512)
    report = aot.compile(jax.jit(decode_step, donate_argnums=3), *arguments, gpu="h100")
    assert not report.faults()
    cache_bytes = cache.keys.size * 2 * 2
    assert report.memory.alias_size_in_bytes >= cache_bytes
    assert report.copies(cache.keys.shape) == 0
    assert report.memory.temp_size_in_bytes < 256e6


def test_on_eight_gpus_it_has_two_all_reduces_a_layer(monkeypatch):
    """Heads and the MLP's inner dimension over eight cards: each works on its own kv head with the same tables."""
    local = LlamaConfig(
        vocab_size=128_256,
        d_model=4096,
        num_layers=32,
        num_heads=4,
        num_kv_heads=1,
        head_dim=128,
        d_ff=14_336 // 8,
        max_len=8192,
    )
    for name in ("Attention", "MLP"):
        module = getattr(llama_module, name)
        call = module.__call__

        def summed(self, *arguments, call=call):
            result = call(self, *arguments)
            return lax.psum(result, "x") if not isinstance(result, tuple) else (lax.psum(result[0], "x"), result[1])

        monkeypatch.setattr(module, "__call__", summed)
    mesh = aot.mesh("h100", (8,), ("x",))
    graph, parameters = nnx.split(abstract_llama(local, scan_layers=True))

    def spec(path, _):
        """The weights' sharded axis, by their letters; the first axis is the layers'."""
        axes = {"qkv_weight_kghd": 1, "o_weight_dnh": 2, "gate_up_weight_2fd": 2, "down_weight_df": 2}
        axis = next((axis for name, axis in axes.items() if name in jax.tree_util.keystr(path)), None)
        return P() if axis is None else P(*[None] * axis, "x")

    specs = jax.tree_util.tree_map_with_path(spec, parameters)

    def whole(x, spec):
        shape = tuple(
            size * 8 if name == "x" else size for size, name in zip(x.shape, (*spec, *[None] * x.ndim), strict=False)
        )
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    heads = P(None, None, None, "x")
    cache = cache_of(32, BLOCKS, BLOCK_SIZE, 8, 128)
    replicated = P()

    def step(parameters, tokens, positions, cache, batch):
        return decode_step(nnx.merge(graph, parameters), tokens, positions, cache, batch)

    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(specs, replicated, replicated, heads, replicated),
        out_specs=(replicated, heads),
        check_vma=False,
    )
    arguments = (
        jax.tree.map(whole, parameters, specs),
        *(jax.tree.map(lambda x: whole(x, replicated), x) for x in (struct(BATCH), struct(BATCH))),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, heads)), cache),
        jax.tree.map(lambda x: whole(x, replicated), batch_of(BATCH, 512)),
    )
    report = aot.compile(jax.jit(sharded, donate_argnums=3), *arguments, gpu="h100", devices=mesh)
    assert not report.faults()
    assert report.collectives() == {"all-reduce": 2}  # in the body of the loop over the layers
    local_shape = (32, BLOCKS, BLOCK_SIZE, 1, 128)
    assert report.copies(local_shape) == 0
    assert report.memory.alias_size_in_bytes >= cache.keys.size * 2 * 2 // 8
    assert report.memory.temp_size_in_bytes < 256e6
