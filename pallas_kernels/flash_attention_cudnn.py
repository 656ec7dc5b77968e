"""cuDNN's flash attention, through `jax.nn.dot_product_attention`, for what it does exactly as ours."""

import jax
import jax.numpy as jnp
from jax import Array

from .attention_spec import AttentionOperands, AttentionSpec


def unsupported(query: Array, key: Array, value: Array, operands: AttentionOperands, spec: AttentionSpec) -> str | None:
    """Why cuDNN cannot serve, or None."""
    (_, T, N, H), S = query.shape, key.shape[1]
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 and float16, not {query.dtype}"
    if H % 8 or H > 128:
        return f"cuDNN takes head dims up to 128 that are multiples of 8, not {H}"
    if min(T, S) == 0:
        return f"cuDNN takes no empty sequence, and the lengths are {T} and {S}"
    if spec.upper not in (None, 0) or (spec.lower is not None and (spec.upper is None or spec.lower > 0 or T > S)):
        return "cuDNN knows causal order without an offset and, within it, left windows of as many keys as rows"
    if operands.bias is not None and (operands.bias.shape != (1, N, T, S) or T % 2 or S % 2):
        return f"cuDNN has the gradient of a bias {(1, N, T, S)} of even lengths only, not of {operands.bias.shape}"
    lacking = {
        "a mask (a row that sees nothing would see the mean)": operands.mask,
        "segment ids": operands.query_segments,
        "a block mask": operands.block_mask,
        "this dropout": operands.dropout_seeds,
        "a soft cap": spec.soft_cap,
        "key_value_seq_lengths (a length of 0 would give no zeros)": operands.key_lengths,
    }
    asked = [name for name, value in lacking.items() if value is not None]
    return f"cuDNN has no {asked[0]}" if asked else None


def attend(
    query: Array, key: Array, value: Array, operands: AttentionOperands, spec: AttentionSpec
) -> tuple[Array, None]:
    """Output [B, T, N, H]; `jax.nn` has its derivative."""
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        operands.bias,
        scale=spec.scale,
        is_causal=spec.upper is not None,
        query_seq_lengths=operands.query_lengths,
        local_window_size=None if spec.lower is None else (-spec.lower, 0),
        implementation="cudnn",
    )
    return out, None
