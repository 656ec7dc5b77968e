"""The Hopper kernels for the gradients, interpreted with race detection, against the formulas."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import BFLOAT16, Case, assert_as_exact, gradients, make, softmax_attention
from flash_mosaic_cases import CASES, operands_of, spec_of
from mosaic_interpreter import interpreted, mutant, without_races

from pallas_kernels import flash_attention_mosaic_backward as mosaic
from pallas_kernels import mosaic_backward_scores as scores
from pallas_kernels import mosaic_fused_backward as fused
from pallas_kernels.flash_backward_config import ALL, BackwardConfig, TileConfig


def problem(case, dtype: Any = BFLOAT16):
    """The arrays of a case, and what `backward` takes: the forward pass's results by the formula."""
    arrays = make(case, dtype)
    rng = np.random.default_rng(1)
    dout = rng.standard_normal(arrays["query"].shape).astype(dtype)
    d_residual = rng.standard_normal(arrays["query"].shape[:3]).astype(np.float32)
    out, residual, _ = softmax_attention(arrays, np.float64, **case.options)
    lse = np.where(np.isneginf(residual), np.inf, residual)
    delta = (out * dout.astype(np.float64)).sum(-1) - d_residual
    lse, delta = (jnp.asarray(x.swapaxes(1, 2), jnp.float32) for x in (lse, delta))
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    return arrays, (query, key, value, operands_of(arrays), lse, delta, dout), d_residual


def run(case, arguments, config=None, module=mosaic, runner=without_races):
    spec = spec_of(case)

    def gradients_by_kernel(query, key, value, operands, lse, delta, dout):
        return module.backward(query, key, value, operands, spec, lse, delta, dout, config)[:3]

    return runner(gradients_by_kernel, *arguments)


def assert_exact(case, found, arrays, dout, d_residual, dtype: Any = BFLOAT16):
    ref, low = (gradients(arrays, dout, d_residual, work, **case.options) for work in (np.float64, dtype))
    for name, gradient in zip(("query", "key", "value"), found, strict=True):
        assert gradient.dtype == dtype
        assert_as_exact(gradient, ref[name], low[name], dtype, factor=3.0, name=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_the_formulas(case):
    arrays, arguments, d_residual = problem(case)
    assert_exact(case, run(case, arguments), arrays, arguments[-1], d_residual)


def test_float16():
    case = Case(130, 200, N=2, H=64, options={"is_causal": True, "query_offset": 70})
    arrays, arguments, d_residual = problem(case, np.float16)
    assert_exact(case, run(case, arguments), arrays, arguments[-1], d_residual, np.float16)


@pytest.mark.parametrize(
    "config",
    [
        BackwardConfig(((("dk",), TileConfig()), (("dv",), TileConfig(warpgroups=1)), (("dq",), TileConfig(stages=1)))),
        BackwardConfig(((("dk", "dv"), TileConfig(warpgroups=3)), (("dq",), TileConfig(step=128)))),
        BackwardConfig(((ALL, TileConfig(step=128, stages=3)),)),
    ],
    ids=["a launch each", "larger tiles", "fused"],
)
def test_any_tiles_give_the_formulas(config):
    case = Case(200, 330, N=2, K=1, options={"is_causal": True, "query_offset": 130})
    arrays, arguments, d_residual = problem(case)
    assert_exact(case, run(case, arguments, config), arrays, arguments[-1], d_residual)


SPLIT = BackwardConfig(((("dk", "dv"), TileConfig()), (("dq",), TileConfig())))
FUSED = BackwardConfig(((ALL, TileConfig(step=128, dq_tiles=2)),))
MUTANTS = {
    "no mistake": None,
    "tiles not waited for": ('plgpu.barrier_wait(memory["full"].at[at])', "pass"),
    "a slot filled before it is free": ('plgpu.barrier_wait(memory["free"].at[at])', "None"),
    "slots not drained": ("drain(self.each_head(load_head), self", "(lambda *_: None)(self.each_head(load_head), self"),
    "the gradients not waited for": ("plgpu.wait_smem_to_gmem(0)", "pass"),
}
FUSED_MUTANTS = {
    "no mistake": None,
    "tiles not waited for": ('plgpu.barrier_wait(memory["full"].at[at])', "pass"),
    "a slot filled before it is free": ('plgpu.barrier_wait(memory["free"].at[slot(number, stages)])', "pass"),
    "dS of the others not waited for": ("self.meet()\n        self.add_queries", "self.add_queries"),
    "dQ overwritten before it is added": ("plgpu.barrier_wait(self.dq_free(at))\n        memory", "memory"),
    "dQ added before it is there": ('plgpu.barrier_wait(memory["dq_full"].at[at])', "pass"),
}


def is_caught(module, config, queries=330):
    case = Case(queries, 70, N=1, K=1, H=64)
    arrays, arguments, d_residual = problem(case)
    try:
        found, raced = run(case, arguments, config, module=module, runner=interpreted)
        assert_exact(case, found, arrays, arguments[-1], d_residual)
    except Exception:
        return True
    return raced


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_caught(name):
    mistake = MUTANTS[name]
    module = mosaic if mistake is None else mutant(mosaic, *mistake)
    assert is_caught(module, SPLIT) == (mistake is not None)


@pytest.mark.parametrize("name", FUSED_MUTANTS)
def test_mistakes_in_the_fused_kernel_are_caught(name, monkeypatch):
    mistake = FUSED_MUTANTS[name]
    if mistake is not None:
        monkeypatch.setattr(mosaic, "FusedBlock", mutant(fused, *mistake).FusedBlock)
    # dS that is not waited for shows in the numbers alone, at each of the steps with some chance: so there are many.
    assert is_caught(mosaic, FUSED, queries=1290) == (mistake is not None)


def test_delta_left_out_is_caught(monkeypatch):
    changed = mutant(scores, "return weight * (dp - delta)", "return weight * dp")
    monkeypatch.setattr(fused.FusedBlock, "logit_gradient", changed.Block.logit_gradient)
    assert is_caught(mosaic, None)
