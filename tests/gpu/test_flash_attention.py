"""flash_attention's Hopper kernels on the card, against the formulas in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
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

from pallas_kernels import explain, flash_attention

pytestmark = pytest.mark.gpu

CASES = [
    Case(1, 1, H=64),
    Case(1, 147, K=1, H=128),
    Case(1, 239, H=40),
    Case(239, 1, N=2, H=64),
    Case(3, 799, H=96),
    Case(799, 3, H=128),
    Case(113, 203, K=4, H=32),
    Case(113, 203, H=64, options={"is_causal": True}),
    Case(127, 513, H=128, options={"is_causal": True, "query_offset": 386}),
    Case(256, 512, H=128),
    Case(512, 256, H=128, options={"is_causal": True}),
    Case(640, 128, H=256),
    Case(640, 128, H=192, options={"is_causal": True, "query_offset": -100}),
    Case(1023, 1024, N=2, H=128, options={"is_causal": True}),
    Case(1024, 1023, N=2, H=64, options={"logits_soft_cap": 15.0}),
    Case(1024, 1024, N=6, K=2, H=80, options={"is_causal": True, "logits_soft_cap": 50.0}),
    Case(2048, 2048, N=2, K=1, H=128, options={"is_causal": True}),
    Case(2048, 2048, N=2, K=1, H=64),
    Case(1001, 777, N=2, H=128, options={"local_window_size": (200, 77)}),
    Case(1001, 1001, N=2, H=64, options={"local_window_size": 130, "is_causal": True}),
    Case(512, 1000, N=2, H=256, options={"local_window_size": (64, 0), "query_offset": 488}),
    Case(1000, 1000, N=2, H=128, data=("query_seq_lengths", "key_value_seq_lengths")),
    Case(1000, 1000, N=4, H=64, data=("query_seq_lengths", "key_value_seq_lengths"), options={"is_causal": True}),
    Case(1000, 900, N=2, H=128, data=("key_value_seq_lengths",), options={"local_window_size": (200, 77)}),
    Case(1000, 1000, N=4, H=128, data=("segment_ids",), options={"is_causal": True}),
    Case(1000, 1000, N=2, H=64, data=("segment_ids",), options={"local_window_size": 130, "is_causal": True}),
    Case(700, 1000, N=4, H=64, data=("two_segment_ids", "key_value_seq_lengths")),
    Case(700, 1000, N=4, K=2, H=128, data=("two_segment_ids", "key_value_seq_lengths", "dropout")),
    Case(1000, 1000, N=2, H=128, data=("segment_ids", "dropout"), options={"logits_soft_cap": 30.0}),
    Case(500, 700, N=2, H=64, data=("dropout",), options={"is_causal": True, "query_offset": 200}),
    Case(1000, 1500, N=2, H=128, data=("wide_block_mask",)),
    Case(1536, 1536, N=4, H=64, data=("wide_head_block_mask",), options={"is_causal": True}),
    Case(1000, 1000, N=4, H=128, data=("wide_head_block_mask", "dropout", "segment_ids")),
]


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_are_the_formulas(case, dtype):
    arrays = make(case, dtype)
    rng = np.random.default_rng(1)
    d_out = rng.standard_normal(arrays["query"].shape).astype(dtype)
    d_residual = rng.standard_normal(arrays["query"].shape[:3]).astype(np.float32)
    options = options_of(case, "mosaic")

    @jax.jit
    def run(given, d_out, d_residual):
        def forward(wanted):
            return flash_attention(**(given | wanted), **options, return_residual=True)

        results, pull_back = jax.vjp(forward, {name: given[name] for name in ("query", "key", "value")})
        return results, pull_back((d_out, d_residual))[0]

    (out, residual), found = run(as_arguments(arrays), d_out, d_residual)
    ref, low = (softmax_attention(arrays, kind, **case.options) for kind in (np.float64, dtype))
    assert_as_exact(out, ref[0], low[0], dtype, name="output")
    assert_as_exact(residual, ref[1], low[1], dtype, name="residual")
    d_out = d_out.astype(np.float64)
    ref, low = (gradients(arrays, d_out, d_residual, kind, **case.options) for kind in (np.float64, dtype))
    for name in found:
        assert_as_exact(found[name], ref[name], low[name], dtype, factor=3.0, name=name)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("H", [64, 128])
def test_the_same_bits_250_times(H, causal):
    """What the interpreter cannot see: a race shows as a result that changes."""
    shape = (2, 4096, 8, H)
    query, key, value, d_out = (
        jnp.asarray(np.random.default_rng(i).standard_normal(shape), ml_dtypes.bfloat16) for i in range(4)
    )

    @jax.jit
    def run(query, key, value) -> Any:
        results, pull_back = jax.vjp(
            lambda *a: flash_attention(*a, is_causal=causal, implementation="mosaic"), query, key, value
        )
        return results, *pull_back(d_out)

    @jax.jit
    def differ(a, b):
        return jnp.stack([jnp.any(x != y) for x, y in zip(a, b, strict=True)])

    first = run(query, key, value)
    assert all(bool(jnp.isfinite(x.astype(jnp.float32)).all()) for x in first)
    changed = sum(differ(first, run(query, key, value)).astype(jnp.int32) for _ in range(250))
    assert not np.asarray(changed).any(), f"of 250 runs, out, dq, dk, dv changed in {changed}"


def test_none_takes_the_hopper_kernels_and_cudnn_what_they_lack():
    query = jnp.zeros((1, 256, 2, 64), jnp.bfloat16)
    assert explain(query, query, query, is_causal=True).implementation == "mosaic"
    bias = jnp.zeros((1, 2, 256, 256), jnp.bfloat16)
    found = explain(query, query, query, bias)
    assert found.implementation == "cudnn"
    assert "bias" in found.reasons["mosaic"]
    single = query.astype(jnp.float32)
    assert explain(single, single, single).implementation == "xla"


@pytest.mark.parametrize(
    "case",
    [
        Case(256, 512, H=64),
        Case(256, 512, H=128, options={"is_causal": True}),
        Case(512, 512, H=128, options={"is_causal": True, "local_window_size": (40, 3)}),
        Case(130, 130, H=64, data=("query_seq_lengths",)),
    ],
    ids=str,
)
def test_cudnn_is_exact_where_it_says_it_serves(case):
    arrays = make(case, BFLOAT16)
    out = jax.jit(lambda given: flash_attention(**given, **options_of(case, "cudnn")))(as_arguments(arrays))
    ref, low = (softmax_attention(arrays, kind, **case.options) for kind in (np.float64, BFLOAT16))
    assert_as_exact(out, ref[0], low[0], BFLOAT16)
