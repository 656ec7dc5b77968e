"""Exact attention over dense arrays, in tiles: the operation, its arguments, and the choice of a backend."""

from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int32

from . import attention_vjp
from .attention_spec import AttentionSpec
from .block_mask import BlockMask
from .devices import lacks_mosaic, platform_and_kind
from .flash_arguments import Call, prepare

Implementation = Literal["mosaic", "cudnn", "xla", "reference"]
ArrayLike = Array | np.ndarray
SegmentIds = Int32[Array, "B T"] | tuple[Int32[Array, "B T"], Int32[Array, "B S"]]

# In the order in which None tries them; "reference" is only ever asked for.
IMPLEMENTATIONS: tuple[Implementation, ...] = ("mosaic", "cudnn", "xla", "reference")
TILED = ("mosaic", "xla")  # with a forward and a backward of their own


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
    block_mask: BlockMask | None
    dropout_rate: float
    dropout_rng: Array | None
    implementation: Implementation | None


@overload
def flash_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, bias: ArrayLike | None = ..., mask: ArrayLike | None = ...,
    *, return_residual: Literal[False] = ..., **options: Unpack[Options],
) -> Array: ...  # fmt: skip
@overload
def flash_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, bias: ArrayLike | None = ..., mask: ArrayLike | None = ...,
    *, return_residual: Literal[True], **options: Unpack[Options],
) -> tuple[Array, Array]: ...  # fmt: skip
def flash_attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K H"],
    bias: Float[ArrayLike, "*#B #N #T #S"] | None = None,
    mask: Bool[ArrayLike, "*#B #N #T #S"] | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_offset: int = 0,
    query_seq_lengths: Int32[Array, " B"] | None = None,
    key_value_seq_lengths: Int32[Array, " B"] | None = None,
    segment_ids: SegmentIds | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    block_mask: BlockMask | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    return_residual: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "*B T N H"] | tuple[Float[Array, "*B T N H"], Float[Array, "*B T N"]]:
    """Exact attention, softmax(scale * Q K^T + bias) V, as in FlashAttention (arXiv 2205.14135, algorithms 1 and 4).

    Names and layouts are those of `jax.nn.dot_product_attention`, and so is the causal alignment: top left. Query
    row i stands at position i + query_offset, for causal and windows alike. Memory is linear in the lengths, forward
    and backward; tiles that no row sees are not computed.

    Args:
      query: [B, T, N, H], or [T, N, H] without a batch; N query heads, a multiple of K (MHA, GQA, MQA).
      key, value: [B, S, K, H]: K key and value heads, in the query's dtype.
      bias: floating, broadcasts to [B, N, T, S]; added to the scaled logits. It has a gradient, as large as itself.
      mask: bool, broadcasts to [B, N, T, S]; False hides a key.
      scale: factor of the logits; None means 1 / sqrt(H).
      is_causal: row i sees keys j <= i + query_offset.
      query_offset: position of the first query row among the keys.
      query_seq_lengths, key_value_seq_lengths: int32 [B]; rows and keys past these are padding.
      segment_ids: int32; rows see keys of their own segment only; one array [B, T] when T == S, else (query's, key's).
      local_window_size: (left, right), or both at once: row i sees keys within [i - left, i + right].
      logits_soft_cap: scaled logits become cap * tanh(logits / cap), before bias and masks.
      block_mask: blocks of the scores that exist at all; the others are neither loaded nor computed.
      dropout_rate: probability with which an entry of the softmax is dropped; the others are divided by 1 - rate.
      dropout_rng: a `jax.random` key. Which entries drop depends on it, and on the entry's sequence in the batch, head,
        row and column, on nothing else: all implementations drop the same.
      return_residual: also the log-sum-exp of each row's logits, float32 [B, T, N], itself differentiable.
      implementation: "mosaic" (Hopper GPUs), "cudnn" (`jax.nn`'s, NVIDIA GPUs), "xla" (anywhere) or "reference" (the
        plain formula in float32, all T x S logits in memory). None takes the first that can serve; `explain` tells.

    Returns the output in the query's dtype; a row that sees no key gives zeros, a log-sum-exp of -inf, and no gradient.

    Raises TypeError or ValueError where arguments are wrong or do not fit together, with what was expected and what
    came; NotImplementedError where the implementation asked for cannot do what was asked.

    >>> q = jnp.ones((1, 5, 4, 8)); kv = jnp.ones((1, 5, 2, 8))
    >>> flash_attention(q, kv, kv, is_causal=True).shape
    (1, 5, 4, 8)
    """
    call = prepare(
        query, key, value, bias, mask,
        scale=scale, is_causal=is_causal, query_offset=query_offset, query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths, segment_ids=segment_ids, local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap, block_mask=block_mask, dropout_rate=dropout_rate, dropout_rng=dropout_rng,
    )  # fmt: skip
    chosen = _choose(call, implementation, return_residual)
    if chosen.implementation is None:
        raise NotImplementedError(f"flash_attention: {chosen}")
    out, lse = _run(chosen.implementation, call)
    out = out[0] if call.unbatched else out
    if not return_residual:
        return out
    residual = jnp.swapaxes(lse, 1, 2)
    return out, residual[0] if call.unbatched else residual


@dataclass(frozen=True)
class Explanation:
    """Which implementation serves a call (None: none can), and why those before it do not."""

    implementation: Implementation | None
    reasons: dict[Implementation, str]

    def __str__(self) -> str:
        lines = [f"{name} cannot serve: {reason}" for name, reason in self.reasons.items()]
        return "; ".join(lines + ([f"{self.implementation} serves"] if self.implementation else []))


def explain(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, bias: ArrayLike | None = None, mask: ArrayLike | None = None,
    *, return_residual: bool = False, **options: Unpack[Options],
) -> Explanation:  # fmt: skip
    """Which implementation `flash_attention` takes for these arguments, and why not the ones before it.

    Raises as `flash_attention` does for wrong arguments, but never NotImplementedError.

    >>> q = jnp.ones((1, 5, 4, 8))
    >>> explain(q, q, q, implementation="reference").implementation
    'reference'
    """
    implementation = options.pop("implementation", None)
    defaults: dict[str, Any] = dict.fromkeys(Options.__annotations__)
    del defaults["implementation"]
    defaults |= {"is_causal": False, "query_offset": 0, "dropout_rate": 0.0}
    unknown = options.keys() - defaults.keys()
    if unknown:
        raise TypeError(f"explain: expected the arguments of flash_attention, got {', '.join(sorted(unknown))}")
    return _choose(prepare(query, key, value, bias, mask, **(defaults | options)), implementation, return_residual)


def _choose(call: Call, implementation: str | None, return_residual: bool) -> Explanation:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        known = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"flash_attention: implementation must be {known} or None, got {implementation!r}")
    reasons: dict[Implementation, str] = {}
    for name in IMPLEMENTATIONS[:-1] if implementation is None else (implementation,):
        reason = _lacks(name, call, return_residual)
        if reason is None:
            return Explanation(name, reasons)
        reasons[name] = reason
    return Explanation(None, reasons)


def _lacks(name: Implementation, call: Call, return_residual: bool) -> str | None:
    """Why an implementation cannot serve the call here, or None."""
    platform, kind = platform_and_kind()
    if name == "mosaic" and (reason := lacks_mosaic()) is not None:
        return reason
    if name == "cudnn" and platform not in ("gpu", "cuda"):
        return f"cuDNN is for NVIDIA GPUs, and this is {kind}"
    if name == "cudnn" and return_residual:
        return "its log-sum-exp has no gradient"
    query, key, value, operands, spec, _ = call
    return _backend(name).unsupported(query, key, value, operands, spec)


def _backend(name: Implementation) -> ModuleType:
    # Imported at first use: only a GPU needs Mosaic, and loading it takes a while.
    return import_module(f".flash_attention_{name}", __package__)


def _run(name: Implementation, call: Call) -> tuple[Array, Any]:
    query, key, value, operands, spec, _ = call
    attend = _attend if name in TILED else _attend_plainly
    return attend(_backend(name), spec, query, key, value, operands)


# Under jit, so that a call outside of it compiles once and not at each call.
_attend = jax.jit(attention_vjp.attend, static_argnums=(0, 1))


@partial(jax.jit, static_argnums=(0, 1))
def _attend_plainly(backend: ModuleType, spec: AttentionSpec, *arguments: Any) -> tuple[Array, Any]:
    """By a backend that JAX can differentiate as it stands."""
    return backend.attend(*arguments, spec)
