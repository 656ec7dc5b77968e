"""The Hopper kernels for paged decode, interpreted with race detection, against the formula in a cache full of NaN."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from mosaic_interpreter import caught, interpreted, mutant, without_races
from paged_oracle import LAYER, Step, assert_sequences_exact

from pallas_kernels import paged_attention, paged_decode, paged_decode_config, paged_merge, write_kv
from pallas_kernels import paged_attention_mosaic as mosaic

# Of few blocks, each works off several items; of small chunks, many sequences have several parts.
SMALL = {"blocks": 2, "chunk": 128, "whole": 0}


def decodes(contexts, **changes):
    shape: dict[str, Any] = {"rows": len(contexts) + 1, "tokens": len(contexts) + 2, "max_context": 384}
    shape |= {"max_query_len": 1, "dtype": ml_dtypes.bfloat16, "H": 64, "num_blocks": None}
    shape |= changes
    if shape["num_blocks"] is None:
        size = shape.get("block_size", 16)
        shape["num_blocks"] = 3 * sum(-(-context // size) for context in contexts)
    return Step([(1, context) for context in contexts], **shape)


def small_config(step, **changes):
    _, cache, *_ = step.arguments()
    K, H = cache.num_kv_heads, cache.head_dim
    return dataclasses.replace(
        paged_decode_config.default_config(K, step.queries[0].shape[1] // K, H), **SMALL | {"stages": 2} | changes
    )


def program(step, left=None, config=None, **options):
    """A function of (query, cache, batch), and these."""
    query, cache, batch, key, value = step.arguments()
    cache = write_kv(cache, batch, LAYER, key, value)
    static = mosaic.Options(options.get("scale", query.shape[-1] ** -0.5), options.get("logits_soft_cap"), left)

    def decode(query, cache, batch):
        tables = batch.block_tables + LAYER * cache.num_blocks
        out = mosaic.decode(query, cache, batch, tables, static, config or small_config(step))
        return out[..., : cache.head_dim]

    return decode, query, cache, batch


CONTEXTS = [5, 300, 129, 64, 128, 1]


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"block_size": 24, "N": 1, "K": 1}, {}),
        ({"block_size": 32, "N": 9, "K": 3, "dtype": np.float16}, {"scale": 0.3}),
        ({"block_size": 64, "N": 2, "K": 2, "H": 128}, {"logits_soft_cap": 3.0}),
        ({"block_size": 128, "N": 24, "K": 2}, {"left": 100}),
        ({"block_size": 256, "N": 4, "K": 1, "H": 256}, {}),
        ({"N": 6, "K": 2, "H": 80}, {"left": 64, "logits_soft_cap": 8.0}),
        ({"N": 4, "K": 4, "H": 32}, {"left": 0}),
    ],
)
def test_output_is_the_formula(changes, options):
    step = decodes(CONTEXTS, **changes)
    out = without_races(*program(step, **options))
    assert_sequences_exact(step, out, **options)


def test_a_decodes_bits_do_not_depend_on_the_batch():
    """In another order, alone, and at another number of thread blocks."""
    step = decodes(CONTEXTS, block_size=32)
    together = np.asarray(without_races(*program(step)))
    attend, *_ = program(step, config=small_config(step, blocks=3))
    order = [3, 1, 4, 0, 5, 2]
    for chosen in (order, [1], [5]):
        query, cache, batch, key, value = step.arguments(chosen)
        cache = write_kv(cache, batch, LAYER, key, value)
        out = np.asarray(without_races(attend, query, cache, batch))
        np.testing.assert_array_equal(out[: len(chosen)], together[chosen])


@pytest.mark.parametrize(
    ("changes", "options"), [({}, {}), ({"N": 9, "K": 3}, {"left": 100}), ({"H": 80}, {"logits_soft_cap": 8.0})]
)
def test_sequences_of_one_part_need_no_merge(monkeypatch, changes, options):
    """Where none can be longer; their bits are those that they have beside longer ones, and who has none gets zeros."""
    step = decodes(CONTEXTS, **changes)
    attend, query, cache, batch = program(step, config=small_config(step, whole=384), **options)
    wide = dataclasses.replace(batch, block_tables=jnp.pad(batch.block_tables, ((0, 0), (0, 16))))
    merged = without_races(attend, query, cache, wide)
    monkeypatch.setattr(paged_merge, "merge", None)
    out = without_races(attend, query, cache, batch)
    assert_sequences_exact(step, out, **options)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(merged))
    assert not np.asarray(out)[len(CONTEXTS) :].any()


def test_how_a_sequence_is_cut_depends_on_its_length_alone():
    config = paged_decode_config.DecodeConfig(heads=2, splits=8, stages=3, whole=0, chunk=512, blocks=132)
    lengths = np.array([0, 1, 512, 513, 4096, 4097, 9000, 0, 65536], np.int32)

    def parts(lengths):
        items = paged_decode.split(jnp.zeros(len(lengths), jnp.int32), jnp.asarray(lengths), 65536, config)
        fields = np.asarray(items.fields)[: int(items.total[0])]
        np.testing.assert_array_equal(fields[:, 4], np.arange(len(fields)))
        return [fields[start : start + count, :4] for start, count, _ in np.asarray(items.runs)]

    together = parts(lengths)
    for i, (length, mine) in enumerate(zip(lengths, together, strict=True)):
        assert (mine[:, 0] == i).all()
        tokens = np.concatenate([np.arange(start, stop) for _, start, stop, _ in mine] or [np.arange(0)])
        np.testing.assert_array_equal(tokens, np.arange(length))
        assert len(mine) <= config.splits
        assert (mine[:, 1] % paged_decode.TILE == 0).all()
        np.testing.assert_array_equal(parts([length])[0][:, 1:], mine[:, 1:])
    assert [len(mine) for mine in together] == [0, 1, 1, 2, 8, 8, 8, 0, 8]


def test_short_sequences_are_whole():
    config = paged_decode_config.DecodeConfig(heads=2, splits=8, stages=3, whole=1024, chunk=512, blocks=132)

    def parts(lengths, max_tokens):
        lengths = jnp.array(lengths, jnp.int32)
        return np.asarray(paged_decode.split(jnp.zeros_like(lengths), lengths, max_tokens, config).runs)[:, 1].tolist()

    assert parts([0, 1, 1024, 1025, 4096], 65536) == [0, 1, 1, 3, 8]
    assert parts([0, 1, 1024], 1024) == [1, 1, 1]


def test_windows_skip_the_blocks_outside():
    config = paged_decode_config.DecodeConfig(heads=1, splits=8, stages=3, whole=0, chunk=512, blocks=132)
    items = paged_decode.split(jnp.array([3999, 0], jnp.int32), jnp.array([5000, 100], jnp.int32), 8192, config)
    assert np.asarray(items.fields)[:4, :4].tolist() == [
        [0, 3968, 4352, 3999],
        [0, 4352, 4736, 3999],
        [0, 4736, 5000, 3999],
        [1, 0, 100, 0],
    ]


def test_a_shared_item_leaves_a_part_for_each_of_its_sequences():
    config = paged_decode_config.DecodeConfig(heads=1, splits=8, stages=3, whole=0, chunk=512, blocks=132)
    low, prefix, place, members = (
        jnp.array(x, jnp.int32) for x in ([0] * 5, [640, 640, 640, 0, 64], [0, 1, 0, 0, 0], [2, 1, 1, 1, 1])
    )
    items = paged_decode.split(low, prefix, 8192, config, place, members)
    assert np.asarray(items.fields)[: int(items.total[0])].tolist() == [
        [0, 0, 320, 0, 0, 2, 2],
        [0, 320, 640, 0, 1, 2, 2],
        [2, 0, 320, 0, 4, 1, 2],
        [2, 320, 640, 0, 5, 1, 2],
        [4, 0, 64, 0, 6, 1, 1],
    ]
    assert np.asarray(items.runs).tolist() == [[0, 2, 0], [2, 2, 1], [4, 2, 0], [6, 0, 0], [6, 1, 0]]


class Parts:
    """Parts of a few sequences, of which some have seen nothing: a log-sum-exp of -inf. NaN wherever is none."""

    def __init__(self, counts, H, N=6, K=2):
        rng = np.random.default_rng(0)
        total, self.group = sum(counts), N // K
        self.columns = np.asarray(paged_decode.columns_of_heads(N, K))
        logs = 10 * rng.standard_normal((total, N)).astype(np.float32)
        empty = rng.random((total, N)) < 0.3
        self.lse = np.full((total + 8, 8 * K), np.nan, np.float32)
        self.lse[:total, self.columns] = np.where(empty, -np.inf, logs)
        self.parts = np.full((total + 8, paged_merge.whole_segments(N, H), H), np.nan, np.float32)
        self.parts[:total, :N] = np.where(empty[..., None], 0, rng.standard_normal((total, N, H)))
        self.runs = np.stack([np.cumsum([0, *counts[:-1]]), counts, np.zeros_like(counts)], -1).astype(np.int32)

    def merged(self, merge):
        """What a kernel makes of them, and whether it raced."""
        arrays = map(jnp.asarray, (self.parts, self.lse, self.runs, self.columns))
        return interpreted(partial(merge, group=self.group, dtype=jnp.bfloat16), [paged_merge.Parts(*arrays)])

    def assert_exact(self, out):
        for (start, count, _), found in zip(self.runs, np.asarray(out).astype(np.float64), strict=True):
            here = slice(start, start + count)
            logs = self.lse[here, self.columns].astype(np.float64)
            weights = np.exp2(logs - logs.max(0, initial=-1e30))
            weights /= np.maximum(weights.sum(0), 1e-30)
            expected = np.einsum("sn,snh->nh", weights, self.parts[here, : len(self.columns)].astype(np.float64))
            np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("sizes", [{"H": 64}, {"H": 128}, {"H": 192}, {"H": 64, "N": 9, "K": 3}], ids=str)
@pytest.mark.parametrize("counts", [[0, 1, 2, 3, 5, 17], [33, 97]])
def test_parts_are_merged_by_their_log_sum_exp(counts, sizes):
    parts = Parts(counts, **sizes)
    out, raced = parts.merged(paged_merge.merge)
    assert not raced
    parts.assert_exact(out)


MUTANTS = {
    "none": ("drain(done", "drain(done"),
    "keys not awaited": ('plgpu.barrier_wait(memory["keys_full"].at[at])', "pass"),
    "values not awaited": ('plgpu.barrier_wait(memory["values_full"].at[at])', "pass"),
    "slots not awaited": ("(partial(plgpu.barrier_wait, free))", "(lambda: None)"),
    "NaN times 0": ("jnp.where(visible(value.shape), value, jnp.zeros_like(value))", "value"),
    "end not masked": ("jnp.where(visible(s.shape), s, -jnp.inf)", "s"),
    "end not passed on": ("first, item.low, item.stop)", "first, item.low, item.stop - 16)"),
    "sum not rescaled": ("sums * broadcast(alpha, sums.shape, 1) + p", "sums + p"),
    "not drained": ('drain(done, self.config.stages, self.memory["values_free"])', "pass"),
    "log of another base": ("m + jnp.log2(safe)", "m + jnp.log(safe)"),
    "stores not awaited": ("(self.compute_item)\n        plgpu.wait_smem_to_gmem(0)", "(self.compute_item)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_in_decode_are_caught(monkeypatch, name):
    if name != "none":
        monkeypatch.setattr(mosaic, "paged_decode", mutant(paged_decode, *MUTANTS[name]))
    step = decodes([330, 129, 70])
    run = program(step, left=150)
    assert caught(lambda: interpreted(*run), partial(assert_sequences_exact, step, left=150)) == (name != "none")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("TOGETHER = 8", "TOGETHER = 2"),  # no mistake
        ("total * alpha, out * alpha", "total, out"),
        ("nth < count", "nth <= count"),
        ("lax.min(nth, count - 1)", "nth"),
        ("< SEGMENT // 2", "< SEGMENT"),
        ("LEAST, 0.0, 0.0", "-jnp.inf, 0.0, 0.0"),
    ],
)
def test_mistakes_in_merge_are_caught(old, new):
    parts = Parts([1, 5, 97], 64)
    changed = mutant(paged_merge, old, new)
    assert caught(lambda: parts.merged(changed.merge), parts.assert_exact) == (old != "TOGETHER = 8")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_size": 4}, "its block sizes are multiples of 8, got 4"),
        ({"dtype": np.float32}, "its kernels are for bfloat16 and float16, and the cache is float32"),
        ({"N": 40, "K": 1}, "it takes at most 32 query heads a kv head, got 40"),
        ({"H": 320}, "its head dims are at most 256, got 320"),
        ({"N": 1, "K": 1, "H": 36}, "must be a multiple of 16 bytes, got 1 kv heads of head dim 36"),
    ],
)
def test_what_it_cannot_serve_is_said_and_left_to_xla(changes, reason):
    step = decodes([5, 100], **changes)
    query, cache, batch, key, value = step.arguments()
    cache = write_kv(cache, batch, LAYER, key, value)

    attend = partial(paged_attention, query, cache, batch, LAYER)
    with plgpu.force_gpu_interpret_mode():
        with pytest.raises(NotImplementedError, match=reason):
            attend(implementation="mosaic")
        assert_sequences_exact(step, attend())


def test_a_scale_that_is_not_positive_is_said_and_left_to_xla():
    """The kernels look for the largest product before they scale it."""
    query, cache, batch, key, value = decodes([5, 100]).arguments()
    attend = partial(paged_attention, query, write_kv(cache, batch, LAYER, key, value), batch, LAYER)
    with plgpu.force_gpu_interpret_mode():
        with pytest.raises(NotImplementedError, match=r"its kernels take positive scales, not -0\.5"):
            attend(scale=-0.5, implementation="mosaic")
        served = attend(scale=-0.5)
    np.testing.assert_array_equal(np.asarray(served), np.asarray(attend(scale=-0.5, implementation="xla")))


def test_elsewhere_than_on_a_hopper_gpu_xla_serves():
    step = decodes([5, 100])
    query, cache, batch, key, value = step.arguments()
    cache = write_kv(cache, batch, LAYER, key, value)
    with pytest.raises(NotImplementedError, match=r"Hopper GPUs .* and this is cpu"):
        paged_attention(query, cache, batch, LAYER, implementation="mosaic")
    assert_sequences_exact(step, jax.jit(paged_attention)(query, cache, batch, LAYER))
