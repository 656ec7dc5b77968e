"""The plain formula in float32, all T x S logits at once: what the other backends are held against."""

import jax
import jax.numpy as jnp
from jax import Array

from . import dropout
from .attention_spec import AttentionOperands, AttentionSpec


def unsupported(query: Array, key: Array, value: Array, operands: AttentionOperands, spec: AttentionSpec) -> str | None:
    """Why this backend cannot serve: it always can."""
    return None


def attend(
    query: Array, key: Array, value: Array, operands: AttentionOperands, spec: AttentionSpec
) -> tuple[Array, Array]:
    """Output [B, T, N, H] in the query's dtype and log-sum-exp [B, N, T]; JAX itself differentiates it."""
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    dtype = query.dtype
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    query = query.reshape(B, T, K, N // K, H)
    logits = jnp.einsum("btkgh,bskh->bkgts", query, key, precision="highest").reshape(B, N, T, S) * spec.scale
    if spec.soft_cap is not None:
        logits = spec.soft_cap * jnp.tanh(logits / spec.soft_cap)
    if operands.bias is not None:
        logits = logits + operands.bias.astype(jnp.float32)
    # Rows that see nothing: finite logits keep their gradient from being NaN, the last `where`s make them zero.
    logits = jnp.where(_visible(operands, spec, T, S), logits, -jnp.inf)
    sees = (logits > -jnp.inf).any(-1, keepdims=True)
    logits = jnp.where(sees, logits, 0.0)
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    probs = jnp.where(sees, jnp.exp(logits - lse), 0.0)
    if operands.dropout_seeds is not None:
        kept = _kept(operands.dropout_seeds, N, T, S, spec.dropout_rate)
        probs = jnp.where(kept, probs / (1.0 - spec.dropout_rate), 0.0)
    out = jnp.einsum("bkgts,bskh->btkgh", probs.reshape(B, K, N // K, T, S), value, precision="highest")
    return out.reshape(B, T, N, H).astype(dtype), jnp.where(sees, lse, -jnp.inf)[..., 0]


def _visible(operands: AttentionOperands, spec: AttentionSpec, T: int, S: int) -> Array:
    """Which keys each row sees: bool [B|1, N|1, T, S]."""
    row, column = jnp.arange(T)[:, None], jnp.arange(S)[None]
    visible = jnp.ones((1, 1, T, S), bool)
    if spec.lower is not None:
        visible &= (column - row >= spec.lower)[None, None]
    if spec.upper is not None:
        visible &= (column - row <= spec.upper)[None, None]
    if operands.query_lengths is not None:
        visible &= row[None, None] < operands.query_lengths[:, None, None, None]
    if operands.key_lengths is not None:
        visible &= column[None, None] < operands.key_lengths[:, None, None, None]
    if operands.query_segments is not None and operands.key_segments is not None:
        visible &= (operands.query_segments[:, :, None] == operands.key_segments[:, None, :])[:, None]
    if operands.block_mask is not None:
        visible &= operands.block_mask.dense(T, S)[None]
    return visible if operands.mask is None else visible & operands.mask


def _kept(seeds: Array, N: int, T: int, S: int, rate: float) -> Array:
    """Which entries dropout keeps: bool [B, N, T, S]."""
    head = jnp.arange(N, dtype=jnp.uint32)[None, :, None]
    row = jnp.arange(T, dtype=jnp.uint32)[None, None, :]
    key1, key2 = dropout.row_keys(seeds[:, 0, None, None], seeds[:, 1, None, None], head, row)
    return dropout.keep(key1[..., None], key2[..., None], jnp.arange(S, dtype=jnp.uint32)[None, None, None], rate)
