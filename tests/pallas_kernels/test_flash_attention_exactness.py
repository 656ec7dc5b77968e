"""The xla backend by the rule of `attention_oracle`, output and gradients, over the lengths and head dims that
FlashAttention's own tests take; every option stands beside several lengths and head dims."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import (
    BFLOAT16,
    Case,
    as_arguments,
    assert_as_exact,
    gradients,
    make,
    options_of,
    softmax_attention,
)

from pallas_kernels import flash_attention

CAUSAL = {"is_causal": True}
CASES = [
    Case(1, 1, H=256),
    Case(1, 147, K=1, H=40, options={**CAUSAL, "query_offset": 120}),
    Case(1, 239, H=96, data=("key_value_seq_lengths",)),
    Case(239, 1, N=2, H=80, data=("bias",)),
    Case(3, 799, H=192, options={**CAUSAL, "query_offset": 796}),
    Case(799, 3, K=4, H=128, options=CAUSAL),
    Case(113, 203, N=6, K=3, H=32, data=("two_segment_ids", "dropout")),
    Case(127, 513, K=1, H=64, options={"local_window_size": (83, 41), "query_offset": 219, "logits_soft_cap": 15.0}),
    Case(256, 512, H=128, data=("query_seq_lengths", "key_value_seq_lengths"), options={"logits_soft_cap": 50.0}),
    Case(512, 256, H=17, options={"local_window_size": (57, 3), **CAUSAL}),
    Case(640, 128, N=3, K=1, H=256, data=("dropout", "mask"), options=CAUSAL),
    Case(1023, 1024, K=1, H=40, data=("two_segment_ids",), options=CAUSAL),
    Case(1024, 1023, N=2, K=2, H=96, data=("wide_block_mask", "row_bias")),
    Case(1100, 1100, N=2, K=1, H=33, data=("wide_head_block_mask", "dropout"), options=CAUSAL),
    Case(2048, 2048, N=2, K=1, H=64, data=("segment_ids",), options=CAUSAL),
]


def check(case, dtype):
    arrays = make(case, dtype)
    rng = np.random.default_rng(1)
    d_out = rng.standard_normal(arrays["query"].shape).astype(dtype)
    d_residual = rng.standard_normal(arrays["query"].shape[:3]).astype(np.float32)
    names = [name for name in ("query", "key", "value", "bias") if name in arrays]
    if case.S == 1 and dtype == np.float32:
        # Softmax of one key is 1, and its gradient exactly 0 where the formula subtracts a product from itself. From
        # delta it is the difference of two sums, 0 within float32's rounding: the rule can judge that in 16 bits only.
        names = ["value"]

    @jax.jit
    def run(arrays):
        def forward(wanted):
            return flash_attention(**(arrays | wanted), **options_of(case, "xla"), return_residual=True)

        results, pull_back = jax.vjp(forward, {name: arrays[name] for name in names})
        return results, pull_back((jnp.asarray(d_out), jnp.asarray(d_residual)))[0]

    (out, residual), found = run(as_arguments(arrays))
    ref, low = (softmax_attention(arrays, kind, **case.options) for kind in (np.float64, dtype))
    d_ref, d_low = (gradients(arrays, d_out, d_residual, kind, **case.options) for kind in (np.float64, dtype))
    assert_as_exact(out, ref[0], low[0], dtype, name="output")
    assert_as_exact(residual, ref[1], low[1], dtype, name="residual")
    for name in names:
        assert found[name].dtype == dtype
        assert_as_exact(found[name], d_ref[name], d_low[name], dtype, factor=3.0, name=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case):
    check(case, np.float32)


@pytest.mark.parametrize("case", [case for case in CASES if case.T * case.S < 200_000], ids=str)
def test_bfloat16(case):
    check(case, BFLOAT16)


@pytest.mark.parametrize("case", [CASES[4], CASES[6]], ids=str)
def test_float16(case):
    check(case, np.float16)
