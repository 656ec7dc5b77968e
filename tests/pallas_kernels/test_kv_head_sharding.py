"""Kv heads over two devices: attention and the cache's writes, each device for itself, are what one device gives."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P
from paged_oracle import LAYER, Step

from pallas_kernels import kv_head_sharding, paged_attention, write_kv


def attend(query, cache, batch, key, value):
    cache = write_kv(cache, batch, LAYER, key, value)
    return paged_attention(query, cache, batch, LAYER), cache


@pytest.mark.parametrize(("N", "K"), [(8, 4), (4, 2), (6, 1)])
def test_two_devices_are_one(N, K):
    query, cache, batch, key, value = Step([(1, 5), (1, 130), (9, 20)], H=16, N=N, K=K).arguments()
    expected, written = jax.jit(attend)(query, cache, batch, key, value)
    heads = kv_head_sharding("x", 2, num_query_heads=N, num_kv_heads=K)
    assert heads.copies == (2 if K == 1 else 1)
    mesh = jax.make_mesh((2,), ("x",))
    specs = (heads.tokens, heads.cache, P(), heads.tokens, heads.tokens)
    sharded = jax.jit(
        jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=(heads.tokens, heads.cache), check_vma=False)
    )
    spread = jax.tree.map(lambda pages: jnp.repeat(pages, heads.copies, axis=3), cache)
    key, value = (jnp.repeat(x, heads.copies, axis=1) for x in (key, value))
    query, spread, batch, key, value = (
        jax.device_put(x, jax.NamedSharding(mesh, spec))
        for x, spec in zip((query, spread, batch, key, value), specs, strict=True)
    )
    out, spread = sharded(query, spread, batch, key, value)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert spread.keys.addressable_shards[0].data.shape[3] == max(K // 2, 1)
    np.testing.assert_array_equal(spread.keys, np.repeat(written.keys, heads.copies, axis=3))


def test_a_cache_that_is_spread_is_not_for_a_kernel_to_gather():
    """Outside of shard_map, where XLA would hand each device the whole cache."""
    query, cache, batch, *_ = Step([(1, 40)], H=64, N=4, K=2, dtype=ml_dtypes.bfloat16).arguments()
    mesh = jax.make_mesh((2,), ("x",))
    cache = jax.device_put(cache, jax.NamedSharding(mesh, P(None, None, None, "x")))
    with (
        plgpu.force_gpu_interpret_mode(),
        pytest.raises(NotImplementedError, match=r"spread over 2 devices: call it inside jax\.shard_map"),
    ):
        paged_attention(query, cache, batch, LAYER, implementation="mosaic")


@pytest.mark.parametrize(
    ("devices", "N", "K", "expected"),
    [
        (4, 12, 6, "6 kv heads do not divide among 4 devices"),
        (8, 24, 3, "3 kv heads do not divide among 8 devices"),
        (4, 6, 2, "6 query heads do not divide among 4 devices"),
        (2, 6, 4, "6 query heads do not divide among 4 kv heads"),
    ],
)
def test_heads_that_do_not_divide_are_refused(devices, N, K, expected):
    with pytest.raises(ValueError, match=expected):
        kv_head_sharding("x", devices, num_query_heads=N, num_kv_heads=K)
