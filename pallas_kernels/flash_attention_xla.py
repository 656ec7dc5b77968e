"""Flash attention in plain XLA operations, on any device and fast on a CPU: FlashAttention's algorithms 1 and 4
(arXiv 2205.14135), in the loop order of arXiv 2307.08691.

For each tile of rows a loop visits the tiles of keys that it sees. Only the scores of one tile exist at a time, for as
many (sequence, head) pairs at once as make the matmuls large.
"""

from functools import partial, reduce
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from .attention_spec import AttentionOperands, AttentionSpec
from .online_softmax import LEAST, LOG2E
from .xla_tiling import Tiles, Tiling

# 2^x for |x| <= 1/2, highest power first: of the polynomials of this degree that are 1 at 0, the one whose relative
# error, 2e-9, is least.
EXP2 = tuple(
    map(np.float32, (1.53533619e-4, 1.33988745e-3, 9.61843736e-3, 5.55033247e-2, 0.240226479, 0.693147203, 1.0))
)


def unsupported(query: Array, key: Array, value: Array, operands: AttentionOperands, spec: AttentionSpec) -> str | None:
    """Why this backend cannot serve: it always can."""
    return None


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    operands: AttentionOperands,
    spec: AttentionSpec,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Output and log-sum-exp."""
    B, T, N, _ = query.shape
    if query.size == 0 or key.size == 0:
        return jnp.zeros_like(query), jnp.full((B, N, T), -jnp.inf, jnp.float32)
    tiling = Tiling.of(query, key, operands, spec)
    lanes, rows, kept = tiling.config.lanes, tiling.config.rows, 1.0 - spec.dropout_rate

    q_all = tiling.pad_rows(_signed(query, spec))
    k, v = tiling.pad_keys(_working(key)), tiling.pad_keys(_working(value))

    def attend(chunk: Array, number: Array) -> tuple[Array, Array]:
        step = tiling.step(chunk, number)
        q = step.rows_of(q_all)

        def visit(tiles: Tiles, state: tuple[Array, Array, Array], partial: bool) -> tuple[Array, Array, Array]:
            m, total, acc = state
            scores = _multiply("lrh,lsh->lrs", q, step.keys_of(k, tiles)).reshape(lanes, rows, -1)
            x, factor, _ = step.logits(tiles, scores, partial)
            m_new = jnp.maximum(m, x.max(-1) * factor)
            alpha = _exp(m - m_new)
            p = _exp(x * factor - m_new[..., None])
            total = total * alpha + p.sum(-1)
            if operands.dropout_seeds is not None:
                p = jnp.where(step.kept(tiles), p, 0.0)
            p = p.reshape(*q.shape[:-1], -1)
            return m_new, total, acc * _column(alpha, q) + _multiply("lrs,lsh->lrh", p, step.keys_of(v, tiles))

        acc = jnp.zeros_like(q, jnp.float32)
        total = acc[..., 0].reshape(lanes, rows)
        m, total, acc = step.sweep(visit, (jnp.full_like(total, LEAST), total, acc))
        safe = jnp.where(total > 0, total, 1.0)
        lse = jnp.where(total > 0, m + jnp.log(safe), -jnp.inf)
        return (acc / _column(safe * kept, q)).astype(query.dtype), lse.reshape(q.shape[:-1])

    out, lse = lax.map(lambda chunk: lax.map(partial(attend, chunk), tiling.steps), tiling.chunks)
    out, lse = tiling.join_rows(out), jnp.swapaxes(tiling.join_rows(lse), 1, 2)
    if operands.query_lengths is not None:  # the rows past them stood in tiles with rows before them
        counts = jnp.arange(T)[None] < operands.query_lengths[:, None]
        out = jnp.where(counts[:, :, None, None], out, 0)
        lse = jnp.where(counts[:, None], lse, -jnp.inf)
    return out, lse


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    operands: AttentionOperands,
    spec: AttentionSpec,
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    dout: Float[Array, "B T N H"],
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of query, key, value and bias; lse is +inf for rows that see nothing."""
    bias = operands.bias
    if query.size == 0 or key.size == 0:
        dbias = None if bias is None else jnp.zeros_like(bias)
        return jnp.zeros_like(query), jnp.zeros_like(key), jnp.zeros_like(value), dbias
    tiling = Tiling.of(query, key, operands, spec)
    lanes, rows, kept = tiling.config.lanes, tiling.config.rows, 1.0 - spec.dropout_rate

    q_all, do_all = tiling.pad_rows(_signed(query, spec)), tiling.pad_rows(_working(dout))
    lse_all = tiling.pad_rows(jnp.swapaxes(lse, 1, 2), fill=jnp.inf)
    delta_all = tiling.pad_rows(jnp.swapaxes(delta, 1, 2))
    k, v = tiling.pad_keys(_working(key)), tiling.pad_keys(_working(value))

    def pull_back(chunk: Array, sums: Any, number: Array) -> tuple[Any, Array]:
        step = tiling.step(chunk, number)
        # Without the barrier XLA cuts the rows out a second time to transpose them.
        q, do = lax.optimization_barrier((step.rows_of(q_all), step.rows_of(do_all)))
        q_transposed, do_transposed = _transposed(q), _transposed(do)
        lse, delta = (step.rows_of(x).reshape(lanes, rows, 1) for x in (lse_all, delta_all))

        def visit(tiles: Tiles, state: Any, partial: bool) -> Any:
            dq, dk, dv, dbias = state
            of_k, of_v = step.keys_of(k, tiles), step.keys_of(v, tiles)
            scores = _multiply("lrh,lsh->lrs", q, of_k).reshape(lanes, rows, -1)
            x, factor, slope = step.logits(tiles, scores, partial)
            # Without the barrier XLA computes p twice, for dv and for ds, rather than store it once.
            p = p_kept = lax.optimization_barrier(_exp(x * factor - lse))
            dp = _multiply("lrh,lsh->lrs", do, of_v).reshape(lanes, rows, -1)
            if operands.dropout_seeds is not None:
                keeps = step.kept(tiles)
                p_kept, dp = jnp.where(keeps, p, 0.0), jnp.where(keeps, dp / kept, 0.0)
            ds = p * (dp - delta)
            if dbias is not None:
                dbias = step.add_to(dbias, tiles, ds)
            if slope is not None:
                ds = ds * slope
            p_kept, ds = (x.reshape(*q.shape[:-1], -1) for x in (p_kept, ds))
            dv = tiles.add_to(dv, _multiply("lhr,lrs->lhs", do_transposed, p_kept))
            dk = tiles.add_to(dk, _multiply("lhr,lrs->lhs", q_transposed, ds))
            return dq + _multiply("lrs,lsh->lrh", ds, of_k), dk, dv, dbias

        dq, *sums = step.sweep(visit, (jnp.zeros_like(q, jnp.float32), *sums))
        return tuple(sums), (dq * spec.scale).astype(query.dtype)

    def pull_back_all(dbias: Array | None, chunk: Array) -> tuple[Array | None, tuple[Array, ...]]:
        tiles = k.shape[1] // tiling.config.keys
        zeros = jnp.zeros_like(k, jnp.float32, (tiles, tiling.kv_lanes, k.shape[3], tiling.config.keys))
        (dk, dv, dbias), dq = lax.scan(partial(pull_back, chunk), (zeros, zeros, dbias), tiling.steps)
        dk, dv = _transposed(dk * (abs(spec.scale) or 1.0)), _transposed(dv / kept)
        return dbias, (dq, dk.astype(key.dtype), dv.astype(value.dtype))

    dbias = None if tiling.operands.bias is None else jnp.zeros_like(tiling.operands.bias, jnp.float32)
    dbias, (dq, dk, dv) = lax.scan(pull_back_all, dbias, tiling.chunks)
    if bias is not None and dbias is not None:
        dbias = dbias[:, :, : bias.shape[2], : bias.shape[3]].astype(bias.dtype)
    return tiling.join_rows(dq), tiling.join_keys(dk), tiling.join_keys(dv), dbias


def _working(x: Array) -> Array:
    """In a dtype that matmuls take; what they sum is float32."""
    return x if x.dtype in (jnp.bfloat16, jnp.float16) else x.astype(jnp.float32)


def _signed(query: Array, spec: AttentionSpec) -> Array:
    """The query with the sign of the scale, so that what is left of it, a positive factor, keeps the maximum."""
    sign = np.sign(spec.scale)
    return _working(query) if sign == 1 else _working(query) * jnp.asarray(sign, _working(query).dtype)


def _transposed(x: Array) -> Array:
    """For matmuls, which are slow where the left contracts another axis than its last."""
    return jnp.swapaxes(x, -2, -1)


def _multiply(equation: str, a: Array, b: Array) -> Array:
    """In the dtype of the narrower one, summed in float32."""

    def in_dtype(dtype: Any, a: Array, b: Array) -> Array:
        a, b = a.astype(dtype), b.astype(dtype)
        return jnp.einsum(equation, a, b, precision="highest", preferred_element_type=jnp.float32)

    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    if narrow == jnp.float32:
        return in_dtype(jnp.float32, a, b)
    # Not every shape has a product of 16-bit matrices on a CPU.
    return lax.platform_dependent(a, b, cpu=partial(in_dtype, jnp.float32), default=partial(in_dtype, narrow))


def _exp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """e^x for x <= 0, in little more than half the time of jnp.exp on a CPU.

    By Cody and Waite's reduction: a polynomial for 2 to the fraction, and the whole power of 2 added to the bits of the
    exponent. The error is at most 7e-8, and 1.2e-38 where numbers are subnormal; from -127 log(2) down it is 0.
    """
    x = jnp.maximum(x * LOG2E, -127)
    whole = jnp.round(x)
    fraction = x - whole
    power = reduce(lambda sum, coefficient: sum * fraction + coefficient, EXP2)
    exponent = lax.shift_left(whole.astype(jnp.int32), jnp.full_like(whole, 23, jnp.int32))
    return lax.bitcast_convert_type(lax.bitcast_convert_type(power, jnp.int32) + exponent, jnp.float32)


def _column(x: Float[Array, "L rows"], q: Float[Array, "kv hr H"]) -> Float[Array, "kv hr 1"]:
    return x.reshape(*q.shape[:-1], 1)
