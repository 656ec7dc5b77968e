"""The Hopper kernel of the forward pass, interpreted with race detection, against the formulas."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import BFLOAT16, Case, as_arguments, assert_as_exact, make, options_of, softmax_attention
from flash_mosaic_cases import CASES, operands_of, spec_of
from jax.experimental.pallas import mosaic_gpu as plgpu
from mosaic_interpreter import interpreted, mutant, without_races

from pallas_kernels import BlockMask, explain, flash_attention
from pallas_kernels import flash_attention_mosaic as mosaic
from pallas_kernels.attention_spec import AttentionOperands, AttentionSpec
from pallas_kernels.flash_forward_config import ForwardConfig, default_config


def run(case, arrays, config=None, module=mosaic, runner=without_races):
    spec = spec_of(case)

    def forward(query, key, value, operands):
        return module.forward(query, key, value, operands, spec, config)

    return runner(forward, *(jnp.asarray(arrays[name]) for name in ("query", "key", "value")), operands_of(arrays))


def assert_exact(case, found, arrays, dtype: Any = BFLOAT16):
    out, lse = found
    ref, low = (softmax_attention(arrays, work, **case.options) for work in (np.float64, dtype))
    assert out.dtype == dtype
    assert_as_exact(out, ref[0], low[0], dtype, name="output")
    assert_as_exact(np.swapaxes(lse, 1, 2), ref[1], low[1], dtype, name="residual")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_residual_are_the_formulas(case):
    arrays = make(case, BFLOAT16)
    assert_exact(case, run(case, arrays), arrays)


def test_float16():
    case = Case(130, 200, N=2, H=64, options={"is_causal": True, "query_offset": 70})
    arrays = make(case, np.float16)
    assert_exact(case, run(case, arrays), arrays, np.float16)


@pytest.mark.parametrize(
    "config",
    [
        ForwardConfig(keys=64, warpgroups=3, stages=2),
        ForwardConfig(keys=128, warpgroups=2, stages=3),
        ForwardConfig(keys=192, warpgroups=1, stages=2),
    ],
    ids=str,
)
def test_any_tiles_give_the_formulas(config):
    case = Case(200, 330, N=2, K=1, options={"is_causal": True, "query_offset": 130})
    arrays = make(case, BFLOAT16)
    assert_exact(case, run(case, arrays, config), arrays)


def test_the_whole_operation_by_name():
    """Output and gradients through `flash_attention`, where the interpreter stands for a Hopper GPU."""
    case = Case(70, 130, N=2, K=1, data=("dropout",), options={"is_causal": True, "query_offset": 60})
    given = as_arguments(make(case, BFLOAT16))

    def attend(given):
        return flash_attention(**given, **options_of(case, "mosaic"), return_residual=True)

    out, residual = without_races(attend, given)
    expected, expected_residual = flash_attention(**given, **options_of(case, "reference"), return_residual=True)
    np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), atol=2e-2)
    np.testing.assert_allclose(residual, expected_residual, atol=1e-5)


MUTANTS = {
    "no mistake": None,
    "keys not waited for": ('plgpu.barrier_wait(memory["k_full"].at[at])', "pass"),
    "values not waited for": ('plgpu.barrier_wait(memory["v_full"].at[at])', "pass"),
    "keys freed early": (
        "s = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))",
        'plgpu.barrier_arrive(memory["k_free"].at[at]); s = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))',
    ),
    "a slot filled before it is free": ("plgpu.barrier_wait(free.at[at])", "None"),
    "slots not drained": ("drain(self.visits.count, config.stages, free)", "pass"),
    "the output not waited for": ("plgpu.wait_smem_to_gmem(0)", "pass"),
    "segment ids freed early": (
        "s = self.hide(s, tile, partial, at)",
        'plgpu.barrier_arrive(memory["k_free"].at[at]); s = self.hide(s, tile, partial, at)',
    ),
    "the end of the keys not hidden": ("visits.step.length % self.config.keys != 0", "False"),
    "the output not rescaled": ("acc[...] = acc[...] * broadcast(alpha, acc.shape, 0)", "pass"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_caught(name):
    case = Case(5, 30, N=1, K=1, H=64) if "end of the keys" in name else Case(70, 600, N=1, K=1, H=64)
    if "segment" in name:
        case = case._replace(data=("two_segment_ids",))
    arrays = make(case, BFLOAT16)
    mistake = MUTANTS[name]
    module = mosaic if mistake is None else mutant(mosaic, *mistake)
    try:
        found, caught = run(case, arrays, module=module, runner=interpreted)
        assert_exact(case, found, arrays)
    except Exception:
        caught = True
    assert caught == (mistake is not None)


def test_what_it_cannot_serve_is_said_and_left_to_others():
    query = jnp.zeros((1, 128, 2, 64), jnp.bfloat16)
    with plgpu.force_gpu_interpret_mode():
        assert explain(query, query, query).implementation == "mosaic"
        changes: list[tuple[dict[str, Any], str]] = [
            ({"bias": jnp.zeros((1, 2, 128, 128), jnp.bfloat16)}, "a bias"),
            ({"mask": jnp.ones((1, 1, 128, 128), bool)}, "a dense mask"),
            ({"scale": -0.125}, "positive scales, not -0.125"),
            ({"block_mask": BlockMask.full(128, 128, block_q=32, block_kv=128)}, "multiples of 64, not 32 x 128"),
        ]
        for change, reason in changes:
            found = explain(query, query, query, **change)
            assert reason in found.reasons["mosaic"]
            assert found.implementation == "xla"
        for array, reason in (
            (query.astype(jnp.float32), "bfloat16 and float16, not float32"),
            (jnp.zeros((1, 8, 2, 257), jnp.bfloat16), "head dims up to 256, not 257"),
            (query[:0], "no empty array"),
        ):
            assert reason in explain(array, array, array).reasons["mosaic"]


def test_tiles_follow_from_head_dim_and_features():
    operands, spec = AttentionOperands(), AttentionSpec(1.0)
    assert default_config(128, operands, spec) == default_config(64, operands, spec)
    small_blocks = replace(operands, block_mask=BlockMask.full(128, 128, block_q=64, block_kv=64))
    assert default_config(128, small_blocks, spec).keys == 64
    for head_dim in (64, 128, 192, 256):
        config = default_config(head_dim, operands, spec)
        assert sum(n * 128 * r for n, r in zip((config.warpgroups, 1), config.registers, strict=True)) <= 65536
