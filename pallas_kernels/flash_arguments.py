"""The arguments of `flash_attention`: checked, and brought into the one form that the backends take."""

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import dropout
from .arguments import check_soft_cap, window_sides
from .attention_spec import AttentionOperands, AttentionSpec
from .block_mask import BlockMask


class Call(NamedTuple):
    """A checked call: arrays of four dimensions, operands that fit them, and the static part."""

    query: Array
    key: Array
    value: Array
    operands: AttentionOperands
    spec: AttentionSpec
    unbatched: bool  # query came as [T, N, H]


def prepare(
    query: Any, key: Any, value: Any, bias: Any, mask: Any,
    *, scale: Any, is_causal: Any, query_offset: Any, query_seq_lengths: Any, key_value_seq_lengths: Any,
    segment_ids: Any, local_window_size: Any, logits_soft_cap: Any, block_mask: Any,
    dropout_rate: Any, dropout_rng: Any,
) -> Call:  # fmt: skip
    """Check everything that can be checked from shapes, dtypes and Python values.

    Raises TypeError where a value is of the wrong kind, ValueError where it does not fit the others.
    """
    query, unbatched = _sequence("query", query)
    key, _ = _sequence("key", key)
    value, _ = _sequence("value", value)
    _check_together(query, key, value)
    (B, T, N, H), S = query.shape, key.shape[1]
    query_segments, key_segments = _segments(segment_ids, B, T, S)
    lower, upper = _band(is_causal, query_offset, window_sides("flash_attention", local_window_size))
    _check_number("scale", scale, optional=True)
    check_soft_cap("flash_attention", logits_soft_cap)
    operands = AttentionOperands(
        bias=_scores("bias", bias, (B, N, T, S)),
        mask=_scores("mask", mask, (B, N, T, S)),
        query_lengths=_integers("query_seq_lengths", query_seq_lengths, (B,)),
        key_lengths=_integers("key_value_seq_lengths", key_value_seq_lengths, (B,)),
        query_segments=query_segments,
        key_segments=key_segments,
        block_mask=_block_mask(block_mask, N, T, S),
        dropout_seeds=_dropout_seeds(dropout_rate, dropout_rng, B),
    )
    spec = AttentionSpec(
        scale=1.0 / math.sqrt(H) if scale is None else float(scale),
        lower=lower,
        upper=upper,
        soft_cap=None if logits_soft_cap is None else float(logits_soft_cap),
        dropout_rate=float(dropout_rate),
    )
    return Call(query, key, value, operands, spec, unbatched)


def _array(name: str, value: Any) -> Array:
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        raise TypeError(f"flash_attention: {name} must be an array, got {type(value).__name__}")
    return jnp.asarray(value)


def _sequence(name: str, value: Any) -> tuple[Array, bool]:
    array = _array(name, value)
    if array.ndim not in (3, 4):
        raise ValueError(
            f"flash_attention: {name} must be [batch, length, heads, head_dim] or [length, heads, head_dim], "
            f"got {array.shape}"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"flash_attention: {name} must have a floating dtype, got {array.dtype}")
    return (array[None], True) if array.ndim == 3 else (array, False)


def _check_together(query: Array, key: Array, value: Array) -> None:
    for name, array in (("key", key), ("value", value)):
        if array.dtype != query.dtype:
            raise ValueError(f"flash_attention: {name} must have the query's dtype {query.dtype}, got {array.dtype}")
    (B, _, N, H), (_, S, K, _) = query.shape, key.shape
    if key.shape != (B, S, K, H) or value.shape != key.shape:
        raise ValueError(
            f"flash_attention: key and value must both be [{B}, kv_len, kv_heads, {H}], "
            f"got {key.shape} and {value.shape}"
        )
    if K == 0 or N % K:
        raise ValueError(f"flash_attention: query heads must be a multiple of the {K} kv heads, got {N}")
    if H == 0:
        raise ValueError("flash_attention: head_dim must be positive, got 0")


def _scores(name: str, value: Any, shape: tuple[int, int, int, int]) -> Array | None:
    """bias or mask, [B|1, N|1, T|1, S]."""
    if value is None:
        return None
    array = _array(name, value)
    if name == "mask" and array.dtype != jnp.bool_:
        raise ValueError(f"flash_attention: mask must be bool, got {array.dtype}")
    if name == "bias" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"flash_attention: bias must have a floating dtype, got {array.dtype}")
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or any(a not in (1, n) for a, n in zip(array.shape, shape, strict=True)):
        raise ValueError(f"flash_attention: {name} must broadcast to {shape}, got {array.shape}")
    return jnp.broadcast_to(array, (*array.shape[:3], shape[3]))


def _integers(name: str, value: Any, shape: tuple[int, ...]) -> Array | None:
    if value is None:
        return None
    array = _array(name, value)
    if array.dtype != jnp.int32 or array.shape != shape:
        raise ValueError(f"flash_attention: {name} must be int32 {shape}, got {array.dtype} {array.shape}")
    return array


def _segments(segment_ids: Any, B: int, T: int, S: int) -> tuple[Array | None, Array | None]:
    if segment_ids is None:
        return None, None
    if not isinstance(segment_ids, tuple):
        if T != S:
            raise ValueError(f"flash_attention: one segment_ids array needs q_len == kv_len, got {T} and {S}")
        segment_ids = segment_ids, segment_ids
    if len(segment_ids) != 2:
        raise ValueError(f"flash_attention: segment_ids must be an array or (query's, key's), got {len(segment_ids)}")
    of_query, of_key = segment_ids
    return (
        _integers("segment_ids of the query", of_query, (B, T)),
        _integers("segment_ids of the key", of_key, (B, S)),
    )


def _band(is_causal: Any, offset: Any, window: tuple[int, int] | None) -> tuple[int | None, int | None]:
    """Row i stands at position i + offset: the band lower <= j - i <= upper of `AttentionSpec`."""
    if not isinstance(is_causal, bool | np.bool_):
        raise TypeError(f"flash_attention: is_causal must be a bool, got {type(is_causal).__name__}")
    if not isinstance(offset, int | np.integer) or isinstance(offset, bool):
        raise TypeError(f"flash_attention: query_offset must be an int, got {type(offset).__name__}")
    lower, upper = (None, None) if window is None else (int(offset) - window[0], int(offset) + window[1])
    if is_causal:
        upper = int(offset)
    return lower, upper


def _check_number(name: str, value: Any, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, numbers.Real | np.generic) or isinstance(value, bool | np.bool_):
        raise TypeError(f"flash_attention: {name} must be a Python number, got {type(value).__name__}")
    if not math.isfinite(float(value)):
        raise ValueError(f"flash_attention: {name} must be finite, got {value}")


def _block_mask(block_mask: Any, N: int, T: int, S: int) -> BlockMask | None:
    if block_mask is None:
        return None
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"flash_attention: block_mask must be a BlockMask, got {type(block_mask).__name__}")
    blocks = -(-T // block_mask.block_q), -(-S // block_mask.block_kv)
    if block_mask.mask.shape not in (blocks, (N, *blocks)):
        raise ValueError(
            f"flash_attention: block_mask in blocks of {block_mask.block_q} x {block_mask.block_kv} must be {blocks} "
            f"or {(N, *blocks)} for {T} x {S} scores of {N} heads, got {block_mask.mask.shape}"
        )
    return block_mask


def _dropout_seeds(rate: Any, rng: Any, B: int) -> Array | None:
    _check_number("dropout_rate", rate)
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"flash_attention: dropout_rate must be at least 0 and below 1, got {rate}")
    if rate == 0.0:
        return None
    if rng is None:
        raise ValueError(f"flash_attention: dropout_rate {rate} needs a dropout_rng, got None")
    if not isinstance(rng, jax.Array | np.ndarray):
        raise TypeError(f"flash_attention: dropout_rng must be a jax.random key, got {type(rng).__name__}")
    return dropout.batch_seeds(jnp.asarray(rng), B)
