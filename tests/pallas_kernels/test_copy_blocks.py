"""Copies of blocks against loops in NumPy; what is not named keeps its bits."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cache_oracle import assert_same_bits, bits, random_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P
from mosaic_interpreter import is_caught, mutant, without_races

from pallas_kernels import KVCache, copy_blocks, copy_blocks_mosaic, gather_blocks, scatter_blocks

DTYPES: list[Any] = [np.float32, np.float16, ml_dtypes.bfloat16]
NUM_BLOCKS, NUM_IDS = 9, 6
SHAPE = (3, NUM_BLOCKS, 2, 3, 5)

copy, gather, scatter = jax.jit(copy_blocks), jax.jit(gather_blocks), jax.jit(scatter_blocks)


@st.composite
def copies(draw):
    """Pairs whose destinations are unique and no sources, among padding."""
    order = draw(st.permutations(range(NUM_BLOCKS)))
    targets = order[: draw(st.integers(0, min(NUM_IDS, NUM_BLOCKS - 1)))]
    pairs = [(draw(st.sampled_from(order[len(targets) :])), target) for target in targets]
    padding = st.sampled_from([(-1, -1), (-1, 0), (0, -1), (-NUM_BLOCKS, NUM_BLOCKS - 1)])
    pairs += [draw(padding) for _ in range(NUM_IDS - len(pairs))]
    return np.array(draw(st.permutations(pairs)), np.int32)


@st.composite
def unique_ids(draw):
    ids = draw(st.permutations(range(NUM_BLOCKS)))[: draw(st.integers(0, NUM_IDS))]
    ids += [draw(st.sampled_from([-1, -NUM_BLOCKS])) for _ in range(NUM_IDS - len(ids))]
    return np.array(draw(st.permutations(ids)), np.int32)


def copied(pages, pairs):
    pages = [array.copy() for array in pages]
    for array in pages:
        for source, target in pairs:
            if source >= 0 and target >= 0:
                array[:, target] = array[:, source]
    return pages


def gathered(pages, ids):
    blocks = np.zeros((len(ids), 2, SHAPE[0], *SHAPE[2:]), pages[0].dtype)
    for i, block in enumerate(ids):
        if block >= 0:
            blocks[i] = np.stack([array[:, block] for array in pages])
    return blocks


@settings(max_examples=60, deadline=None)
@given(pairs=copies(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9))
def test_every_pair_is_copied_and_nothing_else_changes(pairs, dtype, seed):
    pages, cache = random_cache(np.random.default_rng(seed), SHAPE, dtype)
    assert_same_bits(copy(cache, pairs), copied(pages, pairs))


@settings(max_examples=60, deadline=None)
@given(ids=unique_ids(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9))
def test_blocks_are_gathered_whole_and_scattered_back(ids, dtype, seed):
    rng = np.random.default_rng(seed)
    pages, cache = random_cache(rng, SHAPE, dtype)
    blocks = gather(cache, ids)
    assert blocks.dtype == dtype
    np.testing.assert_array_equal(bits(blocks), bits(gathered(pages, ids)))
    others, other_cache = random_cache(rng, SHAPE, dtype)
    for array, other in zip(pages, others, strict=True):
        other[:, ids[ids >= 0]] = array[:, ids[ids >= 0]]
    assert_same_bits(scatter(other_cache, ids, blocks), others)


def test_gathered_ids_may_repeat():
    pages, cache = random_cache(np.random.default_rng(0), SHAPE)
    ids = np.array([4, 4, 0, -1, 4], np.int32)
    np.testing.assert_array_equal(bits(gather_blocks(cache, ids)), bits(gathered(pages, ids)))


def test_nothing_to_copy_is_no_error():
    pages, cache = random_cache(np.random.default_rng(0), SHAPE)
    assert_same_bits(copy_blocks(cache, np.zeros((0, 2), np.int32)), pages)
    none = np.zeros(0, np.int32)
    assert_same_bits(scatter_blocks(cache, none, gather_blocks(cache, none)), pages)


def test_sharded_over_heads_each_card_copies_its_own():
    pages, cache = random_cache(np.random.default_rng(4), (3, NUM_BLOCKS, 2, 4, 5))
    pairs = np.array([[2, 7], [-1, -1], [2, 0], [8, 5]], np.int32)
    heads = P(None, None, None, "model")
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("model",))
    run = jax.shard_map(copy_blocks, mesh=mesh, in_specs=(heads, P()), out_specs=heads, check_vma=False)
    assert_same_bits(jax.jit(run)(cache, pairs), copied(pages, pairs))


@pytest.mark.usefixtures("no_annotation_checks")  # lowering puts descriptions of arguments in their places
@pytest.mark.parametrize("operation", ["copy", "scatter"])
def test_a_donated_cache_is_changed_in_place(operation):
    cache = KVCache.create(num_layers=4, num_blocks=512, block_size=16, num_kv_heads=2, head_dim=64)
    ids = jnp.zeros(8, jnp.int32)
    if operation == "copy":
        lowered = jax.jit(copy_blocks, donate_argnums=0).lower(cache, jnp.zeros((8, 2), jnp.int32))
    else:
        lowered = jax.jit(scatter_blocks, donate_argnums=0).lower(cache, ids, gather_blocks(cache, ids))
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    cache_bytes = cache.keys.nbytes + cache.values.nbytes
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 8
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < cache_bytes / 8


CACHE_SIZES: Any = {"num_layers": 2, "num_blocks": 5, "block_size": 4, "num_kv_heads": 2, "head_dim": 8}
BLOCKS = (3, 2, 2, 4, 2, 8)


@pytest.mark.usefixtures("no_annotation_checks")
@pytest.mark.parametrize(
    ("operation", "arguments", "expected"),
    [
        (copy_blocks, [np.zeros((3, 3), np.int32)], "pairs must be int32 [n, 2], got int32 [3, 3]"),
        (copy_blocks, [np.zeros(2, np.int32)], "pairs must be int32 [n, 2], got int32 [2]"),
        (copy_blocks, [jnp.zeros((3, 2))], "pairs must be int32 [n, 2], got float32 [3, 2]"),
        (copy_blocks, [np.array([[0, 5]], np.int32)], "block ids must be below 5, the cache's blocks, got 5"),
        (copy_blocks, [np.array([[9, 1]], np.int32)], "block ids must be below 5, the cache's blocks, got 9"),
        (copy_blocks, [np.array([[0, 1], [2, 1]], np.int32)], "destinations must be unique, got [1] more than once"),
        (copy_blocks, [np.array([[0, 1], [1, 2]], np.int32)], "no destination may also be a source, got [1] as both"),
        (gather_blocks, [np.zeros((3, 1), np.int32)], "ids must be int32 [n], got int32 [3, 1]"),
        (gather_blocks, [np.zeros(3, np.int64)], "ids must be int32 [n], got int64 [3]"),
        (gather_blocks, [np.array([5, 0], np.int32)], "block ids must be below 5, the cache's blocks, got 5"),
        (
            scatter_blocks,
            [np.zeros(2, np.int32), jnp.zeros(BLOCKS)],
            "[ids, 2, layers, block_size, kv_heads, head_dim] = (2, 2, 2, 4, 2, 8), got (3, 2, 2, 4, 2, 8)",
        ),
        (
            scatter_blocks,
            [np.arange(3, dtype=np.int32), jnp.zeros(BLOCKS, jnp.bfloat16)],
            "blocks must have the cache's dtype float32, got bfloat16",
        ),
        (
            scatter_blocks,
            [np.array([1, 3, 1], np.int32), jnp.zeros(BLOCKS)],
            "scatter_blocks: ids must be unique, got [1] more than once",
        ),
    ],
)
def test_bad_arguments_are_named_with_expected_and_actual(operation, arguments, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        operation(KVCache.create(**CACHE_SIZES), *arguments)


def test_traced_ids_past_the_end_copy_nothing():
    pages, cache = random_cache(np.random.default_rng(2), SHAPE)
    pairs = jnp.array([[0, NUM_BLOCKS], [NUM_BLOCKS, 1], [2**31 - 1, 2], [3, 2**31 - 1]], jnp.int32)
    assert_same_bits(copy(cache, pairs), pages)


# The Hopper kernel: (blocks, block size, kv heads, head dim), from pages of one TMA row to pages of many tiles.
MOSAIC_SHAPES = [(7, 1, 1, 8), (7, 16, 3, 64), (5, 1, 3, 72), (5, 5, 1, 40), (4, 256, 2, 80), (6, 128, 4, 128)]


def mosaic_problem(shape, dtype):
    num_blocks, *page = shape
    rng = np.random.default_rng(sum(shape))
    pages, cache = random_cache(rng, (2, num_blocks, *page), dtype)
    source, *targets = rng.permutation(num_blocks)[:3]
    copies = [(source, target) for target in targets]
    outside = [(num_blocks, 0), (0, num_blocks)]
    return pages, cache, np.array([(-1, 0), *copies, (0, -1), *outside], np.int32)


def is_wrong(module):
    pages, cache, pairs = mosaic_problem((7, 64, 3, 64), np.float32)
    expected = copied(pages, pairs[1:3])
    return is_caught(module.copy_blocks, (cache, jnp.asarray(pairs)), lambda found: assert_same_bits(found, expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MOSAIC_SHAPES, ids=str)
def test_the_hopper_kernel_copies_the_same(shape, dtype):
    pages, cache, pairs = mosaic_problem(shape, dtype)
    found = without_races(partial(copy_blocks, implementation="mosaic"), cache, jnp.asarray(pairs))
    assert_same_bits(found, copied(pages, pairs[1:3]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("plgpu.barrier_wait(full.at[i])", "pass"),
        ("plgpu.wait_smem_to_gmem(0)", "pass"),
        ("(target >= 0) &", ""),
        ("(source >= 0) &", ""),
        ("& (source < P)", ""),
        ("pairs_ref[pair, 0], pairs_ref[pair, 1]", "pairs_ref[pair, 1], pairs_ref[pair, 0]"),
        ("ref.at[layer, target, part]", "ref.at[0, target, part]"),
        ("tiles.at[i], ref.at[layer, target", "tiles.at[0], ref.at[layer, target"),
        ('lax.axis_index("tile") * tile', "0"),
    ],
)
def test_mistakes_in_the_hopper_kernel_are_caught(old, new):
    assert is_wrong(mutant(copy_blocks_mosaic, old, new))


def test_the_kernel_without_mistakes_is_not():
    assert not is_wrong(copy_blocks_mosaic)


def test_outside_of_shard_map_xla_copies_a_sharded_cache():
    """XLA cannot divide a kernel over devices: it would gather the cache on each."""
    pages, cache = random_cache(np.random.default_rng(4), (3, NUM_BLOCKS, 2, 4, 8))
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("model",))
    cache = jax.device_put(cache, jax.NamedSharding(mesh, P(None, None, None, "model")))
    pairs = np.array([[2, 7], [8, 5]], np.int32)
    with plgpu.force_gpu_interpret_mode():
        assert_same_bits(jax.jit(copy_blocks)(cache, pairs), copied(pages, pairs))
        asked = jax.jit(partial(copy_blocks, implementation="mosaic"))
        with pytest.raises(NotImplementedError, match=r"spread over 2 devices: call it inside jax\.shard_map"):
            asked(cache, pairs)


@pytest.mark.usefixtures("no_annotation_checks")
def test_what_the_hopper_kernel_cannot_do_is_said():
    pairs = np.array([[0, 1]], np.int32)
    cache = KVCache.create(num_layers=1, num_blocks=2, block_size=1, num_kv_heads=1, head_dim=6, dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"its kernels are for Hopper GPUs \(H100, H200\), and this is cpu"):
        copy_blocks(cache, pairs, implementation="mosaic")
    with (
        plgpu.force_gpu_interpret_mode(),
        pytest.raises(NotImplementedError, match="a block of one layer must be a multiple of 16 bytes, got 12"),
    ):
        copy_blocks(cache, pairs, implementation="mosaic")
    unknown: Any = "triton"
    with pytest.raises(ValueError, match="implementation must be 'mosaic', 'xla' or None, got 'triton'"):
        copy_blocks(cache, pairs, implementation=unknown)
