"""How the kv heads of a cache, and the query heads that share them, lie on several devices."""

from typing import NamedTuple

from jax.sharding import PartitionSpec as P


class KVHeadSharding(NamedTuple):
    """The layouts over one axis of a mesh, as `jax.shard_map` and `jax.NamedSharding` take them."""

    cache: P
    """Of `KVCache`, its kv heads."""
    tokens: P
    """Of query, output, key and value [tokens, heads, head_dim], their heads. Tables and slots are the same for all."""
    copies: int
    """Devices that hold the same kv head. The cache then has kv heads * copies heads, each of them so often in a row,
    and `write_kv` takes `jnp.repeat(key, copies, axis=1)`, which repeats on the devices and moves nothing between them
    where the key's projection does so with its weights."""


def kv_head_sharding(axis: str, num_devices: int, *, num_query_heads: int, num_kv_heads: int) -> KVHeadSharding:
    """Each of so many devices along a mesh's axis works on its own kv heads and the query heads that share them.

    With fewer kv heads than devices, each holds a copy of the one that its queries need. Attention and the cache's
    operations then need no other device:

    >>> import jax
    >>> from pallas_kernels import kv_head_sharding, paged_attention
    >>> mesh = jax.make_mesh((1,), ("tensor",))
    >>> heads = kv_head_sharding("tensor", mesh.size, num_query_heads=32, num_kv_heads=8)
    >>> specs = (heads.tokens, heads.cache, jax.P(), jax.P())  # query, cache, batch, layer
    >>> attend = jax.shard_map(paged_attention, mesh=mesh, in_specs=specs, out_specs=heads.tokens, check_vma=False)
    >>> kv_head_sharding("tensor", 8, num_query_heads=32, num_kv_heads=2).copies
    4

    Raises ValueError where query heads do not divide among kv heads or devices, or kv heads neither divide among the
    devices nor devices among the kv heads.
    """
    if num_query_heads % num_kv_heads:
        raise ValueError(f"kv_head_sharding: {num_query_heads} query heads do not divide among {num_kv_heads} kv heads")
    if num_query_heads % num_devices:
        raise ValueError(f"kv_head_sharding: {num_query_heads} query heads do not divide among {num_devices} devices")
    if num_kv_heads % num_devices and num_devices % num_kv_heads:
        raise ValueError(
            f"kv_head_sharding: {num_kv_heads} kv heads do not divide among {num_devices} devices, nor these among them"
        )
    copies = max(num_devices // num_kv_heads, 1)
    return KVHeadSharding(P(None, None, None, axis), P(None, axis), copies)
