"""Batch generation as one pure function: cache, block tables and the whole decoding loop inside one `jax.jit`."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Key

from pallas_kernels import KVCache, PagedBatch

from .runner import Model
from .sampler import SamplingBatch, logprobs_of, sample


class GenerateOutput(NamedTuple):
    """B answers of up to `max_new_tokens` tokens M."""

    tokens: Int32[Array, "B M"]
    """Zeros past the length."""
    lengths: Int32[Array, " B"]
    """With the EOS token, where one came."""
    logprobs: Float[Array, "B M"]
    """By the model's own distribution; zeros past the length."""


def generate(
    model: Model,
    prompt_tokens: Int32[Array, "B P"],
    prompt_lens: Int32[Array, " B"],
    *,
    max_new_tokens: int,
    rng: Key[Array, ""] | None = None,
    temperature: float | Float[Array, ""] = 0.0,
    top_k: int | Int32[Array, ""] = 0,
    top_p: float | Float[Array, ""] = 1.0,
    eos_id: int | None = None,
    block_size: int = 16,
) -> GenerateOutput:
    """Continues every prompt, and ends once all have met `eos_id` or reached `max_new_tokens`.

    A pure function of its arguments, for `jax.jit` and for use inside a larger program: the KV cache and its
    block tables are made inside, B * (P + max_new_tokens) tokens rounded up to blocks. (Where requests come and
    go, `LLM` and `LLMEngine` share one pool among them.)

    Args:
      model: a pytree with `config`, `step` and `logits`, as any of `models`.
      prompt_tokens: padded on the right; what stands past a prompt's length has no influence.
      prompt_lens: at least 1 each (not checked, since it may be traced).
      max_new_tokens, eos_id, block_size: static.
      rng: a threefry key, needed unless `temperature` is a static 0. Token t of row b is drawn with it folded with b,
        then with the token's position.
      temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. Each a number, or an array for one program to
        serve all values.

    Raises ValueError for shapes that do not fit, sizes below 1 or past the model's length, sampling parameters out of
    range, and a temperature above 0 without rng.

    >>> out = jax.jit(generate, static_argnames=("max_new_tokens", "eos_id"))(
    ...     model, jnp.array([[1, 2, 3], [4, 0, 0]]), jnp.array([3, 1]), max_new_tokens=8)    # doctest: +SKIP
    >>> out.tokens.shape                                                                      # doctest: +SKIP
    (2, 8)
    """
    _check(prompt_tokens, prompt_lens, max_new_tokens, block_size)
    _check_sampling(temperature, top_p, rng)
    B, P = prompt_tokens.shape
    config = model.config
    if P + max_new_tokens > config.max_len:
        raise ValueError(
            f"generate: prompts and max_new_tokens must be at most the model's {config.max_len} tokens together, "
            f"got {P} + {max_new_tokens}"
        )
    blocks_each = -(-(P + max_new_tokens) // block_size)
    cache = KVCache.create(
        num_layers=config.num_layers,
        num_blocks=B * blocks_each,
        block_size=block_size,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=jax.tree.leaves(model)[0].dtype,
    )
    tables = jnp.arange(B * blocks_each, dtype=jnp.int32).reshape(B, blocks_each)
    rng = jax.random.key(0) if rng is None else rng
    row_keys = jax.vmap(partial(jax.random.fold_in, rng))(jnp.arange(B))
    asked = partial(
        SamplingBatch,
        jnp.full(B, temperature, jnp.float32),
        jnp.full(B, top_k, jnp.int32),
        jnp.full(B, top_p, jnp.float32),
        jnp.zeros(B, jnp.float32),
    )

    draws = not (isinstance(temperature, int | float) and temperature == 0)
    cuts = draws and (top_k > 0) | (top_p < 1)

    def draw(hidden: Array, position: Array) -> tuple[Array, Array]:
        logits = model.logits(hidden)
        keys = jax.vmap(lambda key, position: jax.random.key_data(jax.random.fold_in(key, position)))
        batch = asked(keys(row_keys, position))
        if isinstance(cuts, bool):
            tokens = sample(logits, batch, draws=draws, cuts=cuts)
        else:  # known only as the program runs
            tokens = lax.cond(cuts, partial(sample, cuts=True), partial(sample, cuts=False), logits, batch)
        return tokens, logprobs_of(logits, tokens)

    def decode(state: "_State") -> "_State":
        position = prompt_lens + state.step - 1  # of the tokens drawn last
        batch = PagedBatch(
            block_tables=tables,
            context_lens=jnp.where(state.is_done, 0, position + 1),
            query_starts=jnp.arange(B + 1, dtype=jnp.int32),
            slot_mapping=jnp.where(state.is_done, -1, _slots(tables, position[:, None], block_size)[:, 0]),
            num_decodes=jnp.int32(B),
            max_query_len=1,
        )
        hidden, cache = model.step(state.last, position, state.cache, batch)
        tokens, logprobs = draw(hidden, position + 1)
        return _advance(state, cache, tokens, logprobs, eos_id)

    hidden, cache = _prefill(model, prompt_tokens, prompt_lens, cache, tables)
    state = _State(
        step=jnp.int32(0),
        cache=cache,
        last=jnp.zeros(B, jnp.int32),
        is_done=jnp.zeros(B, bool),
        output=GenerateOutput(
            jnp.zeros((B, max_new_tokens), jnp.int32), jnp.zeros(B, jnp.int32), jnp.zeros((B, max_new_tokens))
        ),
    )
    state = _advance(state, cache, *draw(hidden, prompt_lens), eos_id)
    state = lax.while_loop(lambda state: (state.step < max_new_tokens) & ~state.is_done.all(), decode, state)
    return state.output


class _State(NamedTuple):
    step: Array  # tokens drawn so far
    cache: KVCache
    last: Array  # [B] tokens drawn last
    is_done: Array  # [B]
    output: GenerateOutput


def _advance(state: _State, cache: KVCache, tokens: Array, logprobs: Array, eos_id: int | None) -> _State:
    """The drawn tokens into the output of the rows that still go on."""
    goes_on = ~state.is_done
    output = GenerateOutput(
        state.output.tokens.at[:, state.step].set(jnp.where(goes_on, tokens, 0)),
        state.output.lengths + goes_on.astype(jnp.int32),
        state.output.logprobs.at[:, state.step].set(jnp.where(goes_on, logprobs, 0.0)),
    )
    is_done = state.is_done if eos_id is None else state.is_done | (tokens == eos_id)
    return _State(state.step + 1, cache, tokens, is_done, output)


def _prefill(
    model: Model, prompt_tokens: Array, prompt_lens: Array, cache: KVCache, tables: Array
) -> tuple[Array, KVCache]:
    """Computes all prompts in one step; returns the hidden state of each one's last token.

    Rows are as wide as the longest prompt, padding included: what is computed there no real token sees, since
    attention is causal, and it is not written.
    """
    B, P = prompt_tokens.shape
    position = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32)[None], (B, P))
    slots = jnp.where(position < prompt_lens[:, None], _slots(tables, position, cache.block_size), -1)
    batch = PagedBatch(
        block_tables=tables,
        context_lens=jnp.full(B, P, jnp.int32),
        query_starts=jnp.arange(B + 1, dtype=jnp.int32) * P,
        slot_mapping=slots.reshape(-1),
        num_decodes=jnp.int32(B if P == 1 else 0),
        max_query_len=P,
    )
    hidden, cache = model.step(prompt_tokens.reshape(-1), position.reshape(-1), cache, batch)
    return hidden[jnp.arange(B) * P + prompt_lens - 1], cache


def _slots(tables: Array, position: Array, block_size: int) -> Array:
    block, offset = jnp.divmod(position, block_size)
    return jnp.take_along_axis(tables, block, axis=1) * block_size + offset


def _check(prompt_tokens: Array, prompt_lens: Array, max_new_tokens: int, block_size: int) -> None:
    if prompt_tokens.ndim != 2 or 0 in prompt_tokens.shape:
        raise ValueError(
            f"generate: prompt_tokens must be [batch, length], neither of them 0, got {prompt_tokens.shape}"
        )
    if prompt_lens.shape != prompt_tokens.shape[:1]:
        raise ValueError(f"generate: prompt_lens must be {prompt_tokens.shape[:1]}, got {prompt_lens.shape}")
    for name, size in (("max_new_tokens", max_new_tokens), ("block_size", block_size)):
        if size < 1:
            raise ValueError(f"generate: {name} must be at least 1, got {size}")


def _check_sampling(temperature: float | Array, top_p: float | Array, rng: Array | None) -> None:
    """What can be known of them: arrays may be traced."""
    if isinstance(temperature, int | float) and not temperature >= 0:
        raise ValueError(f"generate: temperature must be at least 0, got {temperature}")
    if isinstance(top_p, int | float) and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")
    if rng is None and not (isinstance(temperature, int | float) and temperature == 0):
        raise ValueError("generate: rng is needed unless temperature is a plain (static) 0, got None")
    if rng is not None and jax.random.key_data(rng).shape != (2,):
        raise ValueError(f"generate: rng must be one threefry2x32 key, got {jax.typeof(rng)}")
