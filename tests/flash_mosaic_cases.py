"""Cases of dense attention for the Hopper kernels in the interpreter: every feature, tile edge and pair of features."""

import jax
import numpy as np
from attention_oracle import BATCH, DROPOUT, Case

from pallas_kernels import dropout
from pallas_kernels.attention_spec import AttentionOperands, AttentionSpec

LENGTHS = [
    Case(1, 1),
    Case(1, 147, K=1),
    Case(129, 1, N=2),
    Case(113, 203, H=64, N=2),
    Case(128, 192, H=64, N=2),
    Case(131, 64, H=128, N=2, K=1),
    Case(65, 70, N=2, H=80),
    Case(66, 129, N=1, K=1, H=192),
    Case(66, 129, N=1, K=1, H=256, options={"is_causal": True}),
]
BANDS = [
    Case(130, 130, H=64, options={"is_causal": True}),
    Case(70, 200, N=2, options={"is_causal": True, "query_offset": 130}),
    Case(200, 70, N=2, options={"is_causal": True, "query_offset": -70}),  # the first rows see nothing
    Case(260, 260, N=2, options={"local_window_size": (70, 3)}),
    Case(260, 200, N=2, options={"local_window_size": (64, 0), "is_causal": True, "query_offset": 5}),
    Case(130, 130, N=2, options={"local_window_size": (0, 65), "query_offset": 100}),  # rows past key 130 see nothing
]
PADDING_AND_SEGMENTS = [
    Case(200, 200, N=2, data=("query_seq_lengths", "key_value_seq_lengths")),
    Case(200, 200, N=2, K=1, data=("key_value_seq_lengths",), options={"is_causal": True}),
    Case(200, 200, N=2, data=("segment_ids",)),
    Case(131, 200, N=2, data=("two_segment_ids",), options={"local_window_size": 40}),
    Case(131, 131, N=2, K=1, data=("segment_ids", "key_value_seq_lengths"), options={"is_causal": True}),
    Case(260, 200, N=2, K=1, H=128, data=("key_value_seq_lengths",), options={"local_window_size": (64, 8)}),
]
SOFT_CAP_AND_DROPOUT = [
    Case(130, 70, N=2, H=64, options={"logits_soft_cap": 5.0}),
    Case(130, 130, N=2, data=("segment_ids",), options={"logits_soft_cap": 2.0, "is_causal": True}),
    Case(130, 70, N=2, H=64, data=("dropout",)),
    Case(200, 200, N=2, K=1, H=128, data=("dropout", "segment_ids"), options={"is_causal": True}),
    Case(130, 130, N=2, K=1, data=("dropout", "segment_ids"), options={"is_causal": True, "logits_soft_cap": 5.0}),
]
BLOCK_MASKS = [
    Case(520, 300, N=2, K=1, data=("wide_block_mask",)),
    Case(400, 400, N=2, K=1, data=("wide_head_block_mask",), options={"is_causal": True}),
    Case(300, 300, N=2, data=("wide_head_block_mask", "segment_ids", "dropout"), options={"logits_soft_cap": 5.0}),
    Case(520, 300, N=2, data=("wide_block_mask", "query_seq_lengths", "key_value_seq_lengths")),
]
CASES = LENGTHS + BANDS + PADDING_AND_SEGMENTS + SOFT_CAP_AND_DROPOUT + BLOCK_MASKS


def spec_of(case: Case) -> AttentionSpec:
    lower, upper = _band(**case.options)
    rate = DROPOUT["dropout_rate"] if "dropout" in case.data else 0.0
    return AttentionSpec(case.H**-0.5, lower, upper, case.options.get("logits_soft_cap"), rate)


def operands_of(arrays: dict) -> AttentionOperands:
    segments = arrays.get("segment_ids", (None, None))
    operands = AttentionOperands(
        query_lengths=arrays.get("query_seq_lengths"),
        key_lengths=arrays.get("key_value_seq_lengths"),
        query_segments=segments[0],
        key_segments=segments[1],
        block_mask=arrays.get("block_mask"),
        dropout_seeds=dropout.batch_seeds(DROPOUT["dropout_rng"], BATCH) if "dropout" in arrays else None,
    )
    return jax.tree.map(jax.numpy.asarray, operands)


def _band(*, is_causal=False, query_offset=0, local_window_size=None, **_):
    """The options as lower <= j - i <= upper."""
    lower, upper = None, 0 if is_causal else None
    if local_window_size is not None:
        left, right = np.broadcast_to(local_window_size, 2).tolist()
        lower, upper = -left, right if upper is None else min(upper, right)
    return tuple(side if side is None else side + query_offset for side in (lower, upper))
