"""Exact attention over dense arrays: the operation, its arguments, and its plain form."""

import math
from functools import partial
from typing import Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from .arguments import check_implementation, check_soft_cap, window_sides

Implementation = Literal["xla", "reference"]
SegmentIds = Int32[Array, "B T"] | tuple[Int32[Array, "B T"], Int32[Array, "B S"]]


class Options(TypedDict, total=False):
    """The keyword arguments of `flash_attention`, but for `return_residual`."""

    scale: float | None
    is_causal: bool
    query_offset: int
    query_seq_lengths: Int32[Array, " B"] | None
    key_value_seq_lengths: Int32[Array, " B"] | None
    segment_ids: SegmentIds | None
    local_window_size: int | tuple[int, int] | None
    logits_soft_cap: float | None
    implementation: Implementation | None


@overload
def flash_attention(
    query: Array, key: Array, value: Array, bias: Array | None = ..., mask: Array | None = ...,
    *, return_residual: Literal[False] = ..., **options: Unpack[Options],
) -> Array: ...  # fmt: skip
@overload
def flash_attention(
    query: Array, key: Array, value: Array, bias: Array | None = ..., mask: Array | None = ...,
    *, return_residual: Literal[True], **options: Unpack[Options],
) -> tuple[Array, Array]: ...  # fmt: skip
def flash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    bias: Float[Array, "#B #N #T S"] | None = None,
    mask: Bool[Array, "#B #N #T S"] | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_offset: int = 0,
    query_seq_lengths: Int32[Array, " B"] | None = None,
    key_value_seq_lengths: Int32[Array, " B"] | None = None,
    segment_ids: SegmentIds | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    return_residual: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Exact attention, softmax(scale * Q K^T + bias) V, as in FlashAttention (arXiv 2205.14135, eq. 1).

    Names and layouts are those of `jax.nn.dot_product_attention`, and so is the causal alignment: top left. Query
    row i stands at position i + query_offset, for causal and windows alike.

    Args:
      query: N query heads; N is a multiple of K (MHA, GQA, MQA).
      key, value: K key and value heads.
      bias: added to the scaled logits.
      mask: False hides a key.
      scale: factor of the logits; None means 1 / sqrt(H).
      is_causal: row i sees keys j <= i + query_offset.
      query_offset: position of the first query row among the keys.
      query_seq_lengths, key_value_seq_lengths: rows and keys past these are padding.
      segment_ids: rows see keys of their own segment only; one array when T == S, else (query's, key's).
      local_window_size: (left, right), or both at once: row i sees keys within [i - left, i + right].
      logits_soft_cap: scaled logits become cap * tanh(logits / cap), before bias and masks.
      return_residual: also the log-sum-exp of each row's logits, float32.
      implementation: "xla" multiplies in the inputs' dtype and accumulates in float32; "reference" converts the
        inputs to float32 first. None takes the first that can. Both hold all T x S logits.

    Returns the output in the query's dtype; a row that sees no key gives zeros (and a log-sum-exp of -inf).

    Raises ValueError where shapes, dtypes or options do not fit together.

    >>> q = jnp.ones((1, 5, 4, 8)); kv = jnp.ones((1, 5, 2, 8))
    >>> flash_attention(q, kv, kv, is_causal=True).shape
    (1, 5, 4, 8)
    """
    _check_arrays(query, key, value, bias, mask)
    check_soft_cap("flash_attention", logits_soft_cap)
    check_implementation("flash_attention", implementation)
    B, T, _, H = query.shape
    visible = _visible(
        (B, T, key.shape[1]),
        mask=mask,
        is_causal=is_causal,
        query_offset=query_offset,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        segment_ids=segment_ids,
        window=window_sides("flash_attention", local_window_size),
    )
    out, residual = _plain(
        query,
        key,
        value,
        bias,
        visible,
        scale=1.0 / math.sqrt(H) if scale is None else float(scale),
        logits_soft_cap=logits_soft_cap,
        upcast=implementation == "reference",
    )
    return (out, residual) if return_residual else out


def _check_arrays(query: Array, key: Array, value: Array, bias: Array | None, mask: Array | None) -> None:
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 4:
            raise ValueError(f"flash_attention: {name} must be [batch, length, heads, head_dim], got {array.shape}")
        if array.dtype != query.dtype or not jnp.issubdtype(array.dtype, jnp.floating):
            expected = query.dtype if jnp.issubdtype(query.dtype, jnp.floating) else "a floating dtype"
            raise ValueError(f"flash_attention: {name} must have {expected}, as the others, got {array.dtype}")
    (B, T, N, H), (_, S, K, _) = query.shape, key.shape
    if key.shape != (B, S, K, H) or value.shape != key.shape:
        raise ValueError(
            f"flash_attention: key and value must both be [{B}, kv_len, kv_heads, {H}], "
            f"got {key.shape} and {value.shape}"
        )
    if K == 0 or N % K:
        raise ValueError(f"flash_attention: query heads must be a multiple of the {K} kv heads, got {N}")
    for name, array in (("bias", bias), ("mask", mask)):
        if array is not None and (
            array.ndim != 4 or any(a not in (1, n) for a, n in zip(array.shape, (B, N, T, S), strict=True))
        ):
            raise ValueError(f"flash_attention: {name} must broadcast to {(B, N, T, S)}, got {array.shape}")
    if mask is not None and mask.dtype != jnp.bool_:
        raise ValueError(f"flash_attention: mask must be bool, got {mask.dtype}")


def _check_shape(name: str, array: Array, expected: tuple[int, ...]) -> None:
    if array.shape != expected:
        raise ValueError(f"flash_attention: {name} must be {expected}, got {array.shape}")


def _visible(
    shape: tuple[int, int, int],
    *,
    mask: Array | None,
    is_causal: bool,
    query_offset: int,
    query_seq_lengths: Array | None,
    key_value_seq_lengths: Array | None,
    segment_ids: SegmentIds | None,
    window: tuple[int, int] | None,
) -> Array:
    """Which keys each row sees: bool [B|1, N|1, T, S]."""
    B, T, S = shape
    row, column = jnp.arange(T)[:, None], jnp.arange(S)[None]
    position = row + query_offset
    visible = jnp.ones((1, 1, T, S), bool)
    if is_causal:
        visible &= (column <= position)[None, None]
    if window is not None:
        left, right = window
        visible &= ((column >= position - left) & (column <= position + right))[None, None]
    if query_seq_lengths is not None:
        _check_shape("query_seq_lengths", query_seq_lengths, (B,))
        visible &= row[None, None] < query_seq_lengths[:, None, None, None]
    if key_value_seq_lengths is not None:
        _check_shape("key_value_seq_lengths", key_value_seq_lengths, (B,))
        visible &= column[None, None] < key_value_seq_lengths[:, None, None, None]
    if segment_ids is not None:
        if not isinstance(segment_ids, tuple) and T != S:
            raise ValueError(f"flash_attention: one segment_ids array needs q_len == kv_len, got {T} and {S}")
        of_query, of_key = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        _check_shape("segment_ids of the query", of_query, (B, T))
        _check_shape("segment_ids of the key", of_key, (B, S))
        visible &= (of_query[:, :, None] == of_key[:, None, :])[:, None]
    return visible if mask is None else visible & mask


@partial(jax.jit, static_argnames=("scale", "logits_soft_cap", "upcast"))
def _plain(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    visible: Array,
    *,
    scale: float,
    logits_soft_cap: float | None,
    upcast: bool,
) -> tuple[Array, Array]:
    """The formula as it stands, all T x S logits at once."""
    B, T, N, H = query.shape
    K = key.shape[2]
    dtype = query.dtype
    if upcast:
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    query = query.reshape(B, T, K, N // K, H)
    logits = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32)
    logits = logits.reshape(B, N, T, -1) * scale
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    # Rows that see nothing: finite logits keep their gradient from being NaN, the last `where`s make them zero.
    logits = jnp.where(visible, logits, -jnp.inf)
    sees = (logits > -jnp.inf).any(-1, keepdims=True)
    logits = jnp.where(sees, logits, 0.0)
    residual = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    probs = jnp.where(sees, jnp.exp(logits - residual), 0.0)
    residual = jnp.where(sees, residual, -jnp.inf)[..., 0]
    probs = probs.reshape(B, K, N // K, T, -1).astype(value.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", probs, value, preferred_element_type=jnp.float32)
    return out.reshape(B, T, N, H).astype(dtype), jnp.moveaxis(residual, 1, 2)
