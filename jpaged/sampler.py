"""From logits to tokens, on the device: every row by its own parameters and its own random numbers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, UInt32

DRAW_TILE = 256  # tokens
IN_PROMPT = 1 << 30


class LogitEdits(NamedTuple):
    """What is added to single logits, E times; what names no sample is padding."""

    sample: Int32[Array, " E"]
    token_id: Int32[Array, " E"]
    value: Float[Array, " E"]  # a bias, or -inf for a token that must not be drawn
    after: Int32[Array, " E"]  # only where the sample follows this token; -1: whatever it follows


class Penalties(NamedTuple):
    """What each of R rows has said, and what repeating it costs."""

    said: Int32[Array, "R V"]  # how often each token was generated, and IN_PROMPT where it is in the prompt
    presence: Float[Array, " R"]
    frequency: Float[Array, " R"]
    repetition: Float[Array, " R"]


class SamplingBatch(NamedTuple):
    """What each of R rows asks of the sampler; a field of `SamplingParams` each, and what makes its randomness."""

    temperature: Float[Array, " R"]  # 0: greedy
    top_k: Int32[Array, " R"]  # 0 or less: off
    top_p: Float[Array, " R"]  # 1: off
    min_p: Float[Array, " R"]  # 0: off
    keys: UInt32[Array, "R 2"]  # see `sampling_keys`


def sampling_keys(
    seed: UInt32[Array, "R 2"], index: Int32[Array, " R"], position: Int32[Array, " R"]
) -> UInt32[Array, "R 2"]:
    """The random key of one token: a function of the request's 64-bit seed (high word first), the index of the
    sample within the request and the position of the token in its sequence, and of nothing else. So a seed
    gives the same text whatever else is in the batch."""

    def fold(seed: Array, index: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, index), position))

    return jax.vmap(fold)(seed, index, position)


def sample(
    logits: Float[Array, "R V"], batch: SamplingBatch, *, draws: bool = True, cuts: bool = True
) -> Int32[Array, " R"]:
    """Draws one token a row: the likeliest, or by softmax(logits / temperature) cut to top_k, then to top_p of
    what is left, then to min_p times the likeliest token's probability. Tokens that tie with the last one kept
    are kept too. Where it is known that no row draws, or none cuts, that is not computed."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not draws:
        return greedy
    # Below zero, so that the smallest temperature overflows to -inf and not to inf.
    scaled = logits - logits.max(-1, keepdims=True)
    scaled = scaled / jnp.where(batch.temperature > 0, batch.temperature, 1.0)[:, None]
    if cuts:
        scaled = _cut(scaled, batch)
    # A row's token must not depend on whether others cut: behind the barrier both programs compute alike.
    return jnp.where(batch.temperature > 0, _draw(lax.optimization_barrier(scaled), batch.keys), greedy)


def allow(logits: Float[Array, "R V"], allowed: UInt32[Array, "R words"]) -> Float[Array, "R V"]:
    """The logits, with -inf where a row's bit of the token (the lowest of a word first) is 0."""
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32).reshape(1, 1, 32)) & 1
    return jnp.where(bits.reshape(len(logits), -1)[:, : logits.shape[1]] == 1, logits, -jnp.inf)


def edit(logits: Float[Array, "R V"], edits: LogitEdits, previous: Int32[Array, " R"]) -> Float[Array, "R V"]:
    """The logits with the edits added, of samples that follow the tokens `previous`."""
    applies = (edits.after < 0) | (edits.after == previous.at[edits.sample].get(mode="clip"))
    value = jnp.where(applies, edits.value, 0.0)
    return logits.at[edits.sample, edits.token_id].add(value, mode="drop")


def penalize(logits: Float[Array, "R V"], penalties: Penalties) -> Float[Array, "R V"]:
    """Presence and frequency penalties as OpenAI defines them, and the repetition penalty of arXiv 1909.05858."""
    said, presence, frequency, repetition = penalties
    times = said & (IN_PROMPT - 1)
    repeated = jnp.where(logits > 0, logits / repetition[:, None], logits * repetition[:, None])
    logits = jnp.where(said > 0, repeated, logits)
    return logits - frequency[:, None] * times.astype(jnp.float32) - jnp.where(times > 0, presence[:, None], 0.0)


def logprobs_of(logits: Float[Array, "R V"], token_ids: Int32[Array, " R"]) -> Float[Array, " R"]:
    """The log-probability of each row's token under softmax(logits)."""
    chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def top_logprobs(logits: Float[Array, "R V"], n: int) -> tuple[Int32[Array, "R n"], Float[Array, "R n"]]:
    """The n likeliest tokens of each row, or all, best first, and their log-probabilities."""
    values, token_ids = lax.top_k(logits, min(n, logits.shape[-1]))
    return token_ids, values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _draw(logits: Array, keys: Array) -> Array:
    """One draw a row from softmax(logits), by one uniform number and the inverse of the distribution function."""
    R, V = logits.shape
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -V % DRAW_TILE))).reshape(R, -1, DRAW_TILE)
    tiles = weights.sum(-1)
    uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.wrap_key_data(key, impl="threefry2x32")))(keys)
    # First the tile, then the token within it: sums of few terms, which float32 holds well.
    tile, rest = _invert(tiles, uniform * tiles.sum(-1))
    token, _ = _invert(weights[jnp.arange(R), tile], rest)
    return (tile * DRAW_TILE + token).astype(jnp.int32)


def _invert(weights: Array, target: Array) -> tuple[Array, Array]:
    """The first index at which the running sum of weights exceeds target, and what of target was left there.

    Its weight is positive: the target is kept below the last sum, whatever rounding made of it.
    """
    # A parallel cumsum may round up where nothing is added: what has no weight must not be found there.
    sums = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    target = jnp.minimum(target, sums.max(-1) * (1 - jnp.finfo(jnp.float32).eps))
    index = jnp.argmax(sums > target[:, None], axis=-1)
    before = jnp.take_along_axis(sums - weights, index[:, None], axis=-1)[:, 0]
    return index, jnp.maximum(target - before, 0.0)


def _cut(logits: Array, batch: SamplingBatch) -> Array:
    """The logits, with -inf for the tokens that top_k, top_p and min_p leave out."""
    probs = jax.nn.softmax(logits, axis=-1)
    top_k = jnp.where(batch.top_k > 0, batch.top_k, logits.shape[-1])

    def enough_tokens(threshold: Array) -> Array:
        return (probs >= threshold[:, None]).sum(-1) >= top_k

    kept = jnp.where(probs >= _largest_threshold(enough_tokens, len(probs))[:, None], probs, 0.0)
    mass = batch.top_p * kept.sum(-1)

    def enough_mass(threshold: Array) -> Array:
        return jnp.where(kept >= threshold[:, None], kept, 0.0).sum(-1) >= mass

    # At top_p = 1 rounding must not cut the tail.
    threshold = jnp.where(batch.top_p < 1, _largest_threshold(enough_mass, len(probs)), 0.0)
    highest = probs.max(-1)
    threshold = jnp.clip(threshold, batch.min_p * highest, highest)
    return jnp.where((kept > 0) & (kept >= threshold[:, None]), logits, -jnp.inf)


def _largest_threshold(holds, rows: int) -> Array:
    """The largest float in [0, 1] of each row at which `holds`, a condition that a lower threshold only eases.

    Bit by bit: floats that are not negative are ordered as their bits are. Exact, and 30 passes over the
    vocabulary instead of a sort.
    """

    def refine(i: Array, bits: Array) -> Array:
        candidate = bits | (jnp.int32(1) << (29 - i))  # 1.0 has bit 29 as its highest
        value = lax.bitcast_convert_type(candidate, jnp.float32)
        return jnp.where((value <= 1.0) & holds(value), candidate, bits)

    bits = lax.fori_loop(0, 30, refine, jnp.zeros(rows, jnp.int32))
    return lax.bitcast_convert_type(bits, jnp.float32)
