"""The Hopper kernel for paged prefill, interpreted with race detection, against the formula in a cache full of NaN."""

import dataclasses
from functools import partial
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from mosaic_interpreter import caught, interpreted, mutant, without_races
from paged_oracle import LAYER, Step, assert_sequences_exact

from pallas_kernels import paged_attention, paged_prefill, write_kv
from pallas_kernels import paged_attention_mosaic as mosaic
from pallas_kernels.flash_forward_config import ForwardConfig

# Scores of keys past a sequence's end, which nobody sees, are made of whatever lies there.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")

SMALL = ForwardConfig(keys=64, warpgroups=2, stages=2)
LARGE = ForwardConfig(keys=128, warpgroups=3, stages=2)


def steps(sequences, **changes):
    """New tokens and contexts of sequences; padding sequences and tokens after them."""
    shape: dict[str, Any] = {"rows": len(sequences) + 1, "tokens": sum(new for new, _ in sequences) + 3}
    shape |= {
        "max_context": 384,
        "dtype": ml_dtypes.bfloat16,
        "H": 64,
        "max_query_len": 200,
        "num_decodes": 0,
    } | changes
    size = shape.get("block_size", 16)
    return Step(sequences, num_blocks=3 * sum(-(-context // size) for _, context in sequences), **shape)


def program(step, left=None, config=SMALL, chosen=None, **options):
    """A function of (query, cache, batch), and these: zeros in rows that are not its own."""
    query, cache, batch, key, value = step.arguments(chosen)
    cache = write_kv(cache, batch, LAYER, key, value)
    static = mosaic.Options(options.get("scale", query.shape[-1] ** -0.5), options.get("logits_soft_cap"), left)

    def prefill(query, cache, batch):
        tables = batch.block_tables + LAYER * cache.num_blocks
        out = mosaic.prefill(query, cache, batch, tables, static, config)[..., : cache.head_dim]
        return jnp.where(jnp.arange(len(out))[:, None, None] < batch.query_starts[-1], out, 0)

    return prefill, query, cache, batch


SEQUENCES = [(7, 7), (130, 200), (65, 129), (1, 64), (3, 190), (64, 128)]


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"block_size": 8, "N": 1, "K": 1}, {}),
        ({"block_size": 48, "N": 6, "K": 2, "dtype": np.float16}, {"scale": 0.3}),
        (
            {"block_size": 128, "N": 2, "K": 1, "H": 128},
            {"logits_soft_cap": 3.0, "config": LARGE},
        ),
        ({"block_size": 256, "N": 2, "K": 2}, {"left": 70}),
        ({"N": 2, "K": 1, "H": 80}, {"left": 0, "logits_soft_cap": 8.0}),
        ({"N": 1, "K": 1, "H": 256}, {"left": 128}),
    ],
)
def test_output_is_the_formula(changes, options):
    step = steps(SEQUENCES, **changes)
    out = without_races(*program(step, **options))
    options = {name: value for name, value in options.items() if name != "config"}
    assert_sequences_exact(step, out, **options)


def test_a_sequences_bits_do_not_depend_on_the_batch():
    step = steps(SEQUENCES, N=2, K=1)
    together = np.asarray(without_races(*program(step)))
    ends = np.cumsum([new for new, _ in SEQUENCES])
    mine = [together[end - new : end] for (new, _), end in zip(SEQUENCES, ends, strict=True)]
    for chosen in ([2, 0, 4, 1], [1]):
        out = np.asarray(without_races(*program(step, chosen=chosen)))
        expected = np.concatenate([mine[i] for i in chosen])
        np.testing.assert_array_equal(out[: len(expected)], expected)


def test_tiles_are_those_of_the_real_tokens():
    lengths, contexts = [1, 1, 300, 5, 192, 0], [9, 50, 300, 1000, 193, 0]
    starts = np.cumsum([0, *lengths])
    items = paged_prefill.split(
        jnp.asarray(contexts, jnp.int32), jnp.asarray(starts, jnp.int32), jnp.int32(2), 600, tile=192
    )
    found = np.asarray(items.fields)[: int(items.total[0])].tolist()
    assert found == [
        [2, 2, 192, 0, 300],
        [2, 194, 108, 192, 300],
        [3, 302, 5, 995, 1000],
        [4, 307, 192, 1, 193],
    ]
    assert len(items.fields) == 4 + 6


def test_a_mixed_step_goes_to_both_kernels():
    """Through the public operation, as on a card."""
    step = Step([(1, 5), (1, 300), (7, 7), (70, 200)], rows=5, tokens=90, dtype=ml_dtypes.bfloat16, H=64, N=2, K=1)
    query, cache, batch, key, value = step.arguments()
    cache = write_kv(cache, batch, LAYER, key, value)
    config = dataclasses.replace(mosaic.paged_decode_config.default_config(1, 2, 64), blocks=2)
    with pytest.MonkeyPatch.context() as patch:  # 132 thread blocks are many for the interpreter
        patch.setattr(mosaic.paged_decode_config, "default_config", lambda *_: config)
        attend = partial(paged_attention, layer=LAYER, implementation="mosaic")
        out = without_races(attend, query, cache, batch)
    assert_sequences_exact(step, out)


MUTANTS = {
    "none": ("drain(self.steps", "drain(self.steps"),
    "keys not awaited": ('plgpu.barrier_wait(memory["k_full"].at[at])', "pass"),
    "values not awaited": ('(lambda: plgpu.barrier_wait(self.memory["v_full"].at[at]))', "(lambda: None)"),
    "slots not awaited": ('partial(plgpu.barrier_wait, memory[f"{x}_free"].at[at])', "lambda: None"),
    "NaN times 0": ("jnp.where(positions(value.shape, 0) < end - first, value, jnp.zeros_like(value))", "value"),
    "diagonal not masked": ("checks = [column <= row]", "checks = [column <= row + 1]"),
    "first tile of the diagonal": ("first + self.config.keys > self.position + 1", "first > self.position"),
    "window not masked": ("checks.append(column >= row - self.launch.window_left)", "pass"),
    "not drained": ('drain(self.steps, pages.stages, memory[f"{x}_free"])', "pass"),
    "rows at a wrong place": ("count & (-2 * size)", "0"),
    "stores not awaited": ("plgpu.wait_smem_to_gmem(0, wait_read_only=panel + 1 < len(accs))", "pass"),
    "not rescaled": ("acc[...] = acc[...] * broadcast(alpha, acc.shape, 0)", "pass"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_caught(monkeypatch, name):
    if name != "none":
        monkeypatch.setattr(mosaic, "paged_prefill", mutant(paged_prefill, *MUTANTS[name]))
    step = steps([(70, 190), (67, 67), (3, 100)], N=1, K=1)
    run = program(step, left=80)
    assert caught(lambda: interpreted(*run), partial(assert_sequences_exact, step, left=80)) == (name != "none")
