"""One derivative for all tiled backends: backward from the log-sum-exp (FlashAttention, arXiv 2205.14135, algorithm 4).

Backward recomputes the probabilities p from query, key and the log-sum-exp, so the residuals are the inputs, the
output and the log-sum-exp. With delta = rowsum(dout * out), the gradient of the logits is p * (dp - delta), and a
cotangent of the log-sum-exp itself adds p * dlse to it (section 3.1 of arXiv 2307.08691).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from .attention_spec import AttentionOperands, AttentionSpec


def attend(
    backend: ModuleType, spec: AttentionSpec, query: Array, key: Array, value: Array, operands: AttentionOperands
) -> tuple[Array, Array]:
    """Output [B, T, N, H] and log-sum-exp float32 [B, N, T], by the backend's `forward`.

    Both are named ("flash_attention_out", "flash_attention_lse") for the policies of `jax.checkpoint`: where these
    two are saved, backward runs no forward again.
    """
    return _attend(backend, spec, *_varying_alike((query, key, value, operands)))


def _varying_alike(arrays: Any) -> Any:
    """Inside `shard_map`, all of them varying over the axes of the mesh that any varies over, as one kernel's must."""
    axes = frozenset[str]().union(*(_axes_of(x) for x in jax.tree.leaves(arrays)))

    def vary(x: Array) -> Array:
        missing = axes - _axes_of(x)
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(vary, arrays)


def _axes_of(x: Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    backend: ModuleType, spec: AttentionSpec, query: Array, key: Array, value: Array, operands: AttentionOperands
) -> tuple[Array, Array]:
    return _forward(backend, spec)(query, key, value, operands)


def _attend_forward(
    backend: ModuleType, spec: AttentionSpec, query: Array, key: Array, value: Array, operands: AttentionOperands
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    out, lse = _forward(backend, spec)(query, key, value, operands)
    out = checkpoint_name(out, "flash_attention_out")
    lse = checkpoint_name(lse, "flash_attention_lse")
    return (out, lse), (query, key, value, operands, out, lse)


def _attend_backward(
    backend: ModuleType, spec: AttentionSpec, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]
) -> tuple[Any, ...]:
    query, key, value, operands, out, lse = residuals
    dout, dlse = cotangents
    # The barrier keeps XLA from fusing the sum into what lays delta out, where one thread would sum a whole row.
    delta = jax.lax.optimization_barrier((dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1))
    delta = jnp.swapaxes(delta, 1, 2) - dlse
    # A row that saw nothing has no probabilities: exp(logit - inf) is 0, exp(logit + inf) would not be.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    dquery, dkey, dvalue, dbias = _backward(backend, spec)(query, key, value, operands, lse, delta, dout)
    # No other operand has a gradient, and None stands for zeros.
    return dquery, dkey, dvalue, replace(jax.tree.map(lambda _: None, operands), bias=dbias)


_attend.defvjp(_attend_forward, _attend_backward)


@cache
def _forward(backend: ModuleType, spec: AttentionSpec) -> Any:
    def forward(query: Array, key: Array, value: Array, operands: AttentionOperands) -> tuple[Array, Array]:
        return backend.forward(query, key, value, operands, spec)

    return _folding_vmap(forward)


@cache
def _backward(backend: ModuleType, spec: AttentionSpec) -> Any:
    def backward(query, key, value, operands, lse, delta, dout):
        *gradients, dbias = backend.backward(query, key, value, operands, spec, lse, delta, dout)
        return *gradients, dbias

    return _folding_vmap(backward)


def _folding_vmap(function: Any) -> Any:
    """`function`, whose vmap is one call with the mapped axis folded into the batch: kernels see four dimensions."""
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(size: int, is_mapped: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        query, key, value, operands, *rest = arguments
        *of_arrays, of_operands = is_mapped[:4]
        block_mask = operands.block_mask
        if block_mask is not None and of_operands.block_mask.mask:
            # A mask of blocks has no batch to fold into: one call after the other.
            whole = jax.tree.map(partial(_with_axis, size), arguments, tuple(is_mapped))
            out = jax.lax.map(lambda one: function(*one), whole)
            return out, jax.tree.map(lambda _: True, out)

        B = query.shape[1] if is_mapped[0] else query.shape[0]

        def fold(x: Array, is_mapped: bool) -> Array:
            x = _with_axis(size, x, is_mapped)
            x = jnp.broadcast_to(x, (size, B, *x.shape[2:]))  # bias and mask may have 1 for the whole batch
            return x.reshape(size * B, *x.shape[2:])

        folded = jax.tree.map(
            fold,
            (query, key, value, replace(operands, block_mask=None), *rest),
            (*of_arrays, replace(of_operands, block_mask=None), *is_mapped[4:]),
        )
        out = function(*folded[:3], replace(folded[3], block_mask=block_mask), *folded[4:])
        out = jax.tree.map(lambda x: x.reshape(size, B, *x.shape[1:]), out)
        if rest and operands.bias is not None and operands.bias.shape[-4] == 1:  # backward, of a bias of one batch
            *gradients, dbias = out
            out = *gradients, dbias.sum(1, keepdims=True)
        return out, jax.tree.map(lambda _: True, out)

    return mapped


def _with_axis(size: int, x: Array, is_mapped: bool) -> Array:
    return x if is_mapped else jnp.broadcast_to(x[None], (size, *x.shape))
