"""The Hopper kernels for the gradients, interpreted with race detection, against the formulas."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import BATCH, BFLOAT16, DROPOUT, Case, assert_as_exact, gradients, make, softmax_attention
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import BlockMask, dropout
from pallas_kernels import flash_attention_mosaic_backward as mosaic
from pallas_kernels.attention_spec import AttentionOperands, AttentionSpec
from pallas_kernels.flash_attention_mosaic_backward import BackwardConfig, TileConfig, backward

CASES = [
    # Lengths and tile edges.
    Case(1, 1),
    Case(1, 147, K=1),
    Case(129, 1, N=2),
    Case(113, 203, H=64, N=2),
    Case(128, 192, H=64, N=2),
    Case(131, 64, H=128, N=2, K=1),
    Case(65, 70, N=2, H=80),
    Case(66, 129, N=1, K=1, H=192),
    Case(66, 129, N=1, K=1, H=256, options={"is_causal": True}),
    # Bands.
    Case(130, 130, H=64, options={"is_causal": True}),
    Case(70, 200, N=2, options={"is_causal": True, "query_offset": 130}),
    Case(200, 70, N=2, options={"is_causal": True, "query_offset": -70}),  # the first rows see nothing
    Case(260, 260, N=2, options={"local_window_size": (70, 3)}),
    Case(260, 200, N=2, options={"local_window_size": (64, 0), "is_causal": True, "query_offset": 5}),
    Case(130, 130, N=2, options={"local_window_size": (0, 65), "query_offset": 100}),  # rows past key 130 see nothing
    # Lengths and segments.
    Case(200, 200, N=2, data=("query_seq_lengths", "key_value_seq_lengths")),
    Case(200, 200, N=2, K=1, data=("key_value_seq_lengths",), options={"is_causal": True}),
    Case(200, 200, N=2, data=("segment_ids",)),
    Case(131, 200, N=2, data=("two_segment_ids",), options={"local_window_size": 40}),
    Case(131, 131, N=2, K=1, data=("segment_ids", "key_value_seq_lengths"), options={"is_causal": True}),
    # Soft cap.
    Case(130, 70, N=2, H=64, options={"logits_soft_cap": 5.0}),
    Case(130, 130, N=2, data=("segment_ids",), options={"logits_soft_cap": 2.0, "is_causal": True}),
    # Dropout.
    Case(130, 70, N=2, H=64, data=("dropout",)),
    Case(130, 130, N=2, K=1, data=("dropout", "segment_ids"), options={"is_causal": True, "logits_soft_cap": 5.0}),
    # Block masks.
    Case(520, 300, N=2, K=1, data=("wide_block_mask",)),
    Case(400, 400, N=2, K=1, data=("wide_head_block_mask",), options={"is_causal": True}),
    Case(300, 300, N=2, data=("wide_head_block_mask", "segment_ids", "dropout"), options={"logits_soft_cap": 5.0}),
    Case(520, 300, N=2, data=("wide_block_mask", "query_seq_lengths", "key_value_seq_lengths")),
]


def interpreted(function, *arguments):
    """function(*arguments) by the interpreter, which must see no race."""
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            result = jax.block_until_ready(jax.jit(function)(*arguments))
        assert not gpu_callbacks.get_races().races_found
        return result
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


def band(*, is_causal=False, query_offset=0, local_window_size=None, **_):
    """The options as lower <= j - i <= upper."""
    lower, upper = None, 0 if is_causal else None
    if local_window_size is not None:
        left, right = np.broadcast_to(local_window_size, 2).tolist()
        lower, upper = -left, right if upper is None else min(upper, right)
    return tuple(side if side is None else side + query_offset for side in (lower, upper))


def spec_of(case):
    lower, upper = band(**case.options)
    rate = DROPOUT["dropout_rate"] if "dropout" in case.data else 0.0
    return AttentionSpec(case.H**-0.5, lower, upper, case.options.get("logits_soft_cap"), rate)


def operands_of(arrays):
    segments = arrays.get("segment_ids", (None, None))
    return AttentionOperands(
        query_lengths=arrays.get("query_seq_lengths"),
        key_lengths=arrays.get("key_value_seq_lengths"),
        query_segments=segments[0],
        key_segments=segments[1],
        block_mask=arrays.get("block_mask"),
        dropout_seeds=dropout.batch_seeds(DROPOUT["dropout_rng"], BATCH) if "dropout" in arrays else None,
    )


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


def run(case, arguments, config=None):
    spec = spec_of(case)

    def gradients_by_kernel(query, key, value, operands, lse, delta, dout):
        return backward(query, key, value, operands, spec, lse, delta, dout, config)[:3]

    return interpreted(gradients_by_kernel, *arguments)


def assert_exact(case, found, arrays, dout, d_residual, dtype: Any = BFLOAT16):
    ref, low = (gradients(arrays, dout, d_residual, work, **case.options) for work in (np.float64, dtype))
    for name, gradient in zip(("query", "key", "value"), found, strict=True):
        assert gradient.dtype == dtype
        assert_as_exact(gradient, ref[name], low[name], dtype, factor=3.0, name=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_the_formulas(case):
    arrays, arguments, d_residual = problem(case)
    assert_exact(case, run(case, arguments), arrays, arguments[-1], d_residual)
