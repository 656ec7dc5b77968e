"""Writes into the cache against a loop over slots; what is not named keeps its bits."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from attention_oracle import assert_as_exact
from cache_oracle import assert_same_bits, bits, random_cache
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P
from mosaic_interpreter import is_caught, mutant, without_races

from pallas_kernels import (
    KVCache,
    PagedBatch,
    paged_attention,
    rotate_and_write_kv,
    rotate_and_write_kv_mosaic,
    write_kv,
    write_kv_mosaic,
)

DTYPES: list[Any] = [np.float32, np.float16, ml_dtypes.bfloat16]


def writes_to(slots):
    """A batch of which only the slots matter."""
    return PagedBatch(
        block_tables=jnp.zeros((1, 1), jnp.int32),
        context_lens=jnp.zeros(1, jnp.int32),
        query_starts=jnp.zeros(2, jnp.int32),
        slot_mapping=jnp.asarray(slots, jnp.int32),
        num_decodes=jnp.int32(0),
        max_query_len=1,
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_only_the_named_slots_change(block_size, dtype):
    rng = np.random.default_rng(block_size)
    shape = (2, 7, block_size, 2, 4)
    num_slots = 7 * block_size
    write = jax.jit(write_kv)
    chosen = rng.permutation(num_slots)
    for slots in (
        [*chosen[:3], -1, -1],
        [-1, *chosen[:3], -1],
        [num_slots - 1, 0, num_slots - 2, -1, 1],  # the last slot, which -1 may not be taken for
        [-1, num_slots - 2, -1, 0, -1],
        [-1] * 5,
    ):
        pages, cache = random_cache(rng, shape, dtype)
        new = [rng.standard_normal((5, 2, 4)).astype(dtype) for _ in range(2)]
        written = write(cache, writes_to(slots), 1, *(jnp.asarray(array) for array in new))
        for before, now, array in zip(pages, (written.keys, written.values), new, strict=True):
            expected = before.copy()
            for token, slot in enumerate(slots):
                if slot >= 0:
                    expected[1, slot // block_size, slot % block_size] = array[token]
            assert now.dtype == dtype
            np.testing.assert_array_equal(bits(now), bits(expected))


@pytest.mark.parametrize("is_traced", [False, True])
def test_the_layer_may_be_a_number_or_traced(is_traced):
    rng = np.random.default_rng(0)
    _, cache = random_cache(rng, (3, 5, 4, 2, 8))
    batch = writes_to([6, -1, 19])
    keys, values = (jnp.asarray(rng.standard_normal((3, 3, 2, 8)), jnp.float32) for _ in range(2))
    if is_traced:

        def body(cache, layer):
            index, key, value = layer
            return write_kv(cache, batch, index, key, value), None

        written = jax.jit(lambda cache: jax.lax.scan(body, cache, (jnp.arange(3), keys, values))[0])(cache)
    else:
        written = cache
        for layer in range(3):
            written = write_kv(written, batch, layer, keys[layer], values[layer])
    for before, now, new in ((cache.keys, written.keys, keys), (cache.values, written.values, values)):
        expected = np.asarray(before).copy()
        expected[:, 1, 2], expected[:, 4, 3] = new[:, 0], new[:, 2]
        np.testing.assert_array_equal(bits(now), bits(expected))


@pytest.mark.usefixtures("no_annotation_checks")  # lowering puts descriptions of arguments in their places
@pytest.mark.parametrize("is_scanned", [False, True])
def test_a_donated_cache_is_written_in_place(is_scanned):
    """The compiled step, writes and attention of all layers, reuses the cache's memory and holds no copy of it."""
    cache = KVCache.create(num_layers=4, num_blocks=512, block_size=16, num_kv_heads=2, head_dim=64)
    R, T = 4, 36
    batch = PagedBatch(
        block_tables=jnp.zeros((R, 8), jnp.int32),
        context_lens=jnp.array([1, 1, 1, 33], jnp.int32),
        query_starts=jnp.array([0, 1, 2, 3, 36], jnp.int32),
        slot_mapping=jnp.full(T, -1, jnp.int32),
        num_decodes=jnp.int32(3),
        max_query_len=64,
    )
    query, key = jnp.ones((T, 4, 64)), jnp.ones((T, 2, 64))

    @partial(jax.jit, donate_argnums=0)
    def step(cache, batch, query, key):
        def layer(carry, index):
            cache, query = carry
            # As in a model, a layer's keys come from the layer before: no write can be done ahead of time.
            new = key + query[:, :2]
            cache = write_kv(cache, batch, index, new, new)
            return (cache, paged_attention(query, cache, batch, index)), None

        if is_scanned:
            return jax.lax.scan(layer, (cache, query), jnp.arange(4))[0]
        carry = cache, query
        for index in range(4):
            carry, _ = layer(carry, index)
        return carry

    memory = step.lower(cache, batch, query, key).compile().memory_analysis()
    assert memory is not None
    cache_bytes = cache.keys.nbytes + cache.values.nbytes
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 8
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < cache_bytes / 8


@pytest.mark.usefixtures("no_annotation_checks")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"key": jnp.zeros((3, 2, 8))}, "key must be [tokens, kv_heads, head_dim] = (2, 2, 8), got (3, 2, 8)"),
        ({"value": jnp.zeros((2, 4, 8))}, "value must be [tokens, kv_heads, head_dim] = (2, 2, 8), got (2, 4, 8)"),
        ({"value": jnp.zeros((2, 2, 9))}, "value must be [tokens, kv_heads, head_dim] = (2, 2, 8), got (2, 2, 9)"),
        ({"key": jnp.zeros((2, 16))}, "key must be [tokens, kv_heads, head_dim] = (2, 2, 8), got (2, 16)"),
        ({"key": jnp.zeros((2, 2, 8), jnp.bfloat16)}, "key must have the cache's dtype float32, got bfloat16"),
        ({"value": jnp.zeros((2, 2, 8), jnp.int32)}, "value must have the cache's dtype float32, got int32"),
        # Not dropped in silence.
        ({"layer": 3}, "layer must be in [0, 3), got 3"),
        ({"layer": -1}, "layer must be in [0, 3), got -1"),
    ],
)
def test_bad_arguments_are_named_with_expected_and_actual(change, expected):
    arguments = {"layer": 0, "key": jnp.zeros((2, 2, 8)), "value": jnp.zeros((2, 2, 8))} | change
    cache = KVCache.create(num_layers=3, num_blocks=5, block_size=4, num_kv_heads=2, head_dim=8)
    with pytest.raises(ValueError, match=re.escape(expected)):
        write_kv(cache, writes_to([0, 1]), **arguments)


def rotated(x, angles, dtype=np.float64):
    """RoFormer's rotation of the pairs (i, i + H / 2), as a product of complex numbers in float64, or done in dtype."""
    half, (cos, sin) = x.shape[-1] // 2, angles
    if dtype == np.float64:
        turned = (x[..., :half] + 1j * x[..., half:].astype(np.float64)) * (cos + 1j * sin)[:, None]
        return np.concatenate([turned.real, turned.imag], axis=-1)
    cos, sin, x = cos.astype(dtype)[:, None], sin.astype(dtype)[:, None], x.astype(dtype)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def written(pages, slots, new, layer=1):
    """Keys and values with each token's row put where its slot says."""
    pages = [array.copy() for array in pages]
    for array, rows in zip(pages, new, strict=True):
        by_slot = array.reshape(array.shape[0], -1, *array.shape[3:])
        for row, slot in zip(rows, slots, strict=True):
            if 0 <= slot < by_slot.shape[1]:
                by_slot[layer, slot] = row
    return pages


def write_problem(shape, dtype):
    """A third of the slots are padding of one kind or another; there are more kinds than -1 where ids are traced."""
    T, block_size, N, K, H = shape
    rng = np.random.default_rng(T * H + K)
    num_blocks = 2 * T // block_size + 2
    pages, cache = random_cache(rng, (2, num_blocks, block_size, K, H), dtype)
    num_slots = num_blocks * block_size
    slots = rng.permutation(num_slots)[:T]
    padding = rng.choice([-1, -2, -num_slots, num_slots, 2**31 - 1], size=T)
    slots = np.where(rng.random(T) < 0.3, padding, slots).astype(np.int32)
    query, key, value = (rng.standard_normal((T, heads, H)).astype(dtype) for heads in (N, K, K))
    angles = rng.uniform(0, 2 * np.pi, (T, H // 2))
    return (
        pages,
        cache,
        slots,
        (query, key, value),
        (np.cos(angles, dtype=np.float32), np.sin(angles, dtype=np.float32)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "block_size", "K", "H"), [(1, 1, 1, 8), (7, 16, 3, 72), (4, 8, 8, 128), (9, 256, 2, 40), (5, 32, 80, 128)]
)
def test_the_hopper_kernel_writes_the_same(T, block_size, K, H, dtype):
    pages, cache, slots, (_, key, value), _ = write_problem((T, block_size, 1, K, H), dtype)
    write = partial(write_kv, implementation="mosaic")
    found = without_races(write, cache, writes_to(slots), jnp.int32(1), jnp.asarray(key), jnp.asarray(value))
    assert_same_bits(found, written(pages, slots, (key, value)))


def assert_rotated_and_written(result, problem, dtype):
    """Queries and keys as exact as the formula in their dtype, values and all that is not named bit for bit."""
    pages, _, slots, (query, key, value), angles = problem
    found, cache = result
    assert found.dtype == dtype
    assert_as_exact(found, rotated(query, angles), rotated(query, angles, dtype), dtype, name="query")
    ref, low = (rotated(key, angles, kind) for kind in (np.float64, dtype))
    key_pages, value_pages = written(pages, slots, (ref.astype(dtype), value))
    np.testing.assert_array_equal(bits(cache.values), bits(value_pages))
    is_written = np.zeros(key_pages[:, :, :, :1, :1].shape, bool)
    is_written = written([is_written], slots, [np.ones((len(slots), 1, 1), bool)])[0].squeeze((-1, -2))
    np.testing.assert_array_equal(bits(cache.keys)[~is_written], bits(key_pages)[~is_written])
    slot_pages = np.asarray(cache.keys)[1].reshape(-1, *key.shape[1:])
    real = (slots >= 0) & (slots < len(slot_pages))
    assert_as_exact(slot_pages[slots[real]], ref[real], low[real], dtype, name="key")


def qkv_of(query, key, value):
    """As one projection brings them: of each token and kv head its queries, its key and its value."""
    xp = np if isinstance(key, np.ndarray) else jnp
    grouped = query.reshape(*key.shape[:2], query.shape[1] // key.shape[1], key.shape[2])
    return xp.concatenate([grouped, key[:, :, None], value[:, :, None]], axis=2)


def rotation_of(new, angles):
    return tuple(map(jnp.asarray, (qkv_of(*new), *angles)))


# T, block size, N, K, H
ROTARY_CASES = [
    ((1, 1, 1, 1, 16), np.float32),
    *(((17, 16, 3, 1, 64), dtype) for dtype in DTYPES),
    ((33, 8, 2, 2, 80), np.float16),
    ((5, 32, 4, 2, 128), ml_dtypes.bfloat16),
    ((2, 256, 2, 1, 256), np.float32),
]


@pytest.mark.parametrize(("shape", "dtype"), ROTARY_CASES, ids=str)
@pytest.mark.parametrize("implementation", ["mosaic", "xla"])
def test_queries_and_keys_are_rotated_on_the_way(shape, dtype, implementation):
    problem = write_problem(shape, dtype)
    _, cache, slots, new, angles = problem
    arguments = cache, writes_to(slots), jnp.int32(1), *rotation_of(new, angles)
    run = partial(rotate_and_write_kv, implementation=implementation)
    result = without_races(run, *arguments) if implementation == "mosaic" else jax.jit(run)(*arguments)
    assert_rotated_and_written(result, problem, dtype)


@pytest.mark.usefixtures("no_annotation_checks")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"qkv": jnp.zeros((2, 2, 4, 6))},
            "of each + 2, head_dim] = (2, 2, at least 3, 8), got (2, 2, 4, 6)",
        ),
        ({"qkv": jnp.zeros((3, 2, 4, 8))}, "= (2, 2, at least 3, 8), got (3, 2, 4, 8)"),
        ({"qkv": jnp.zeros((2, 3, 4, 8))}, "= (2, 2, at least 3, 8), got (2, 3, 4, 8)"),
        ({"qkv": jnp.zeros((2, 2, 2, 8))}, "= (2, 2, at least 3, 8), got (2, 2, 2, 8)"),
        ({"qkv": jnp.zeros((2, 4, 8))}, "= (2, 2, at least 3, 8), got (2, 4, 8)"),
        ({"qkv": jnp.zeros((2, 2, 4, 8), jnp.bfloat16)}, "qkv must have the cache's dtype float32, got bfloat16"),
        ({"cos": jnp.zeros((2, 8))}, "cos must be [tokens, head_dim / 2] = float32 (2, 4), got float32 (2, 8)"),
        ({"sin": jnp.zeros((2, 4), jnp.bfloat16)}, "sin must be [tokens, head_dim / 2] = float32 (2, 4), got bfloat16"),
        ({"layer": 3}, "rotate_and_write_kv: layer must be in [0, 3), got 3"),
    ],
)
def test_bad_arguments_of_a_rotation_are_named_with_expected_and_actual(change, expected):
    arguments = {"qkv": jnp.zeros((2, 2, 4, 8)), "layer": 0}
    arguments |= {"cos": jnp.zeros((2, 4)), "sin": jnp.zeros((2, 4))}
    cache = KVCache.create(num_layers=3, num_blocks=5, block_size=4, num_kv_heads=2, head_dim=8)
    with pytest.raises(ValueError, match=re.escape(expected)):
        rotate_and_write_kv(cache, writes_to([0, 1]), **arguments | change)


@pytest.mark.parametrize(
    ("operation", "K", "H", "reason"),
    [
        ("write_kv", 1, 6, "the heads of a token must be a multiple of 16 bytes up to 98304, got 12"),
        ("write_kv", 100, 512, "the heads of a token must be a multiple of 16 bytes up to 98304, got 102400"),
        ("rotate_and_write_kv", 2, 72, "head_dim must be a multiple of 16 up to 256, got 72"),
        ("rotate_and_write_kv", 2, 512, "head_dim must be a multiple of 16 up to 256, got 512"),
    ],
)
def test_what_the_hopper_kernels_cannot_do_is_said(operation, K, H, reason):
    """And taken over by XLA where nothing is asked for."""
    problem = write_problem((2, 1, K, K, H), np.float16)
    _, cache, slots, new, angles = problem
    arguments = new[1:] if operation == "write_kv" else (qkv_of(*new), *angles)
    run = partial({"write_kv": write_kv, "rotate_and_write_kv": rotate_and_write_kv}[operation], cache)
    with plgpu.force_gpu_interpret_mode():
        with pytest.raises(NotImplementedError, match=re.escape(f"{operation}: mosaic cannot serve: {reason}")):
            run(writes_to(slots), 1, *map(jnp.asarray, arguments), implementation="mosaic")
        taken_over = run(writes_to(slots), 1, *map(jnp.asarray, arguments))
    plain = run(writes_to(slots), 1, *map(jnp.asarray, arguments), implementation="xla")
    for a, b in zip(jax.tree.leaves(taken_over), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


def test_sharded_over_heads_each_card_writes_its_own():
    """With the same slots for all. (The interpreter takes one device; `test_cache_compiled.py` has the kernels.)"""
    problem = write_problem((5, 16, 4, 2, 32), np.float32)
    _, cache, slots, new, angles = problem
    heads, pages = P(None, "model"), P(None, None, None, "model")

    @partial(
        jax.shard_map,
        mesh=jax.sharding.Mesh(jax.devices()[:2], ("model",)),
        in_specs=(pages, P(), heads, P(), P()),
        out_specs=(heads, pages),
        check_vma=False,
    )
    def run(cache, slots, *arrays):
        assert cache.num_kv_heads == 1
        return rotate_and_write_kv(cache, writes_to(slots), 1, *arrays)

    result = jax.jit(run)(cache, jnp.asarray(slots), *rotation_of(new, angles))
    assert_rotated_and_written(result, problem, np.float32)


def test_no_tokens_write_nothing():
    pages, cache, _, _, _ = write_problem((1, 16, 4, 2, 32), np.float32)
    key = jnp.zeros((0, 2, 32))
    angle, batch = jnp.zeros((0, 16)), writes_to([])
    with plgpu.force_gpu_interpret_mode():
        assert_same_bits(write_kv(cache, batch, 0, key, key, implementation="mosaic"), pages)
        qkv = jnp.zeros((0, 2, 4, 32))
        found, cache = rotate_and_write_kv(cache, batch, 0, qkv, angle, angle, implementation="mosaic")
    assert found.shape == (0, 4, 32)
    assert_same_bits(cache, pages)


WRITE_MISTAKES = [
    ("plgpu.barrier_wait(full.at[i])", "pass"),
    ("plgpu.wait_smem_to_gmem(0)", "pass"),
    ("& (slot >= 0)", ""),
    ("jnp.where(token < T, slots_ref[jnp.minimum(token, T - 1)], -1)", "slots_ref[jnp.minimum(token, T - 1)]"),
    ('start = lax.axis_index("tile") * count', "start = 0 * count"),
    ("[(tiles.at[i, token], ())]", "[(tiles.at[0, token], ())]"),
    ("layer_ref[0]", "0"),
]


def write_is_wrong(module):
    pages, cache, slots, (_, key, value), _ = write_problem((7, 16, 1, 3, 64), np.float32)
    slots[-1] = 5  # a slot that the tokens past the last may not take for theirs
    expected = written(pages, slots, (key, value))
    arguments = cache, jnp.asarray(slots), jnp.int32(1), jnp.asarray(key), jnp.asarray(value)
    return is_caught(module.write_kv, arguments, lambda found: assert_same_bits(found, expected))


def test_the_hopper_write_without_mistakes_is_not_caught():
    assert not write_is_wrong(write_kv_mosaic)


@pytest.mark.parametrize(("old", "new"), WRITE_MISTAKES)
def test_mistakes_in_the_hopper_write_are_caught(old, new):
    assert write_is_wrong(mutant(write_kv_mosaic, old, new))


ROTATION_MISTAKES = [
    ("plgpu.barrier_wait(full)", "pass"),
    ('plgpu.barrier_wait(memory["value_full"])', "pass"),
    ("plgpu.wait_smem_to_gmem(0)", "pass"),
    ("a * cos - b * sin", "a * cos + b * sin"),
    ("b * cos + a * sin", "b * cos - a * sin"),
    ("head >= N", "head > N"),
    ("kv_head = head - N", "kv_head = 0 * head"),
    ("lax.div(head, jnp.int32(group))", "0 * head"),
    ("lax.rem(head, jnp.int32(group))", "0 * head"),
    ("kv_head, group + 1]", "kv_head, group]"),
    ('memory["value"].at[token]', 'memory["value"].at[0]'),
    ("(kv_head, part)", "(0, part)"),
    ("pl.ds(half, half)", "pl.ds(0, half)"),
]


def rotation_is_wrong(module):
    problem = write_problem((3, 16, 4, 2, 64), np.float32)
    _, cache, slots, new, angles = problem
    arguments = cache, jnp.asarray(slots), jnp.int32(1), *rotation_of(new, angles)
    check = partial(assert_rotated_and_written, problem=problem, dtype=np.float32)
    return is_caught(module.rotate_and_write_kv, arguments, check)


def test_the_hopper_rotation_without_mistakes_is_not_caught():
    assert not rotation_is_wrong(rotate_and_write_kv_mosaic)


@pytest.mark.parametrize(("old", "new"), ROTATION_MISTAKES)
def test_mistakes_in_the_hopper_rotation_are_caught(old, new):
    assert rotation_is_wrong(mutant(rotate_and_write_kv_mosaic, old, new))
