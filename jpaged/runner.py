"""The device's side of a step: it holds the weights and the cache, and runs what the scheduler put together."""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels import HostPool, KVCache, PagedBatch, copy_blocks

from .sampler import (
    IN_PROMPT,
    LogitEdits,
    Penalties,
    SamplingBatch,
    allow,
    edit,
    logprobs_of,
    penalize,
    sample,
    sampling_keys,
    top_logprobs,
)
from .sampling_params import MAX_LOGPROBS, SamplingParams
from .sampling_rows import pad, power_of_two
from .scheduler_output import SchedulerOutput
from .step_inputs import StepBuilder, StepInputs, StepShape

MIN_COPIES = 8
LOGITS_TILE = 64  # tokens of a prompt whose logits are held at once


@runtime_checkable
class ModelConfig(Protocol):
    """What the engine needs to know of a model."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_len(self) -> int: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...


@runtime_checkable
class Model(Protocol):
    """A pytree of parameters that computes one step (see `models.Llama`)."""

    @property
    def config(self) -> ModelConfig: ...
    def step(
        self, tokens: Int32[Array, " T"], positions: Int32[Array, " T"], cache: KVCache, batch: PagedBatch
    ) -> tuple[Float[Array, "T D"], KVCache]: ...
    def logits(self, hidden: Float[Array, "n D"]) -> Float[Array, "n V"]: ...


class PromptLogprobs(NamedTuple):
    """Of n successive tokens of one sequence's prompt, the first of them at position `start`."""

    seq_id: int
    start: int
    logprobs: np.ndarray  # float32 [n]
    top_token_ids: np.ndarray  # int32 [n, MAX_LOGPROBS], best first
    top_logprobs: np.ndarray  # float32


class StepResult(NamedTuple):
    """What was sampled, in the order of `SchedulerOutput.samples`."""

    token_ids: list[int]  # -1: there was nothing to draw, since no logit was finite
    logprobs: list[float]  # by the model's own distribution; NaN where the model gave none
    top_token_ids: np.ndarray  # int32 [samples, n], best first; zeros when no row asked
    top_logprobs: np.ndarray  # float32
    prompt_logprobs: list[PromptLogprobs]


class StepInFlight(NamedTuple):
    """A step that the device has been given."""

    output: SchedulerOutput
    sampled: "_Sampled | None"  # None: it only moves blocks
    wanted: list[tuple[int, int, int, int]]  # seq_id, start, and first and last token index, of prompt_logprobs


class _Sampled(NamedTuple):
    """A step's results on the device."""

    token_ids: Array
    logprobs: Array
    top_token_ids: Array
    top_logprobs: Array
    prompt_logprobs: tuple[Array, Array, Array] | None


class Runner:
    """Runs steps on the device, compiled for few shapes, and in place on a donated cache.

    Args:
      model: see `Model`.
      num_blocks, block_size: of the cache, which takes the dtype of the model's parameters.
      num_host_blocks: of the pool in the host's memory that blocks are swapped to.
      max_num_seqs, max_num_batched_tokens, max_model_len: the scheduler's limits.
      batch_invariant: see `EngineConfig`.
      on_compile: told the shape before a step is compiled for it, which takes seconds.
    """

    def __init__(
        self,
        model: Model,
        *,
        num_blocks: int,
        num_host_blocks: int = 0,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        batch_invariant: bool = False,
        on_compile: Callable[[StepShape], None] = lambda shape: None,
    ) -> None:
        # A call with flat leaves is dispatched several times faster than one with a module.
        self._leaves, treedef = jax.tree.flatten(model)
        self._step = jax.jit(
            partial(_step, treedef.unflatten),
            donate_argnames="state",
            static_argnames=("is_decode", "num_logprobs"),
        )
        self._builder = StepBuilder(
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            vocab_size=model.config.vocab_size,
            batch_invariant=batch_invariant,
        )
        self._new_state = partial(_new_state, model.config, num_blocks, block_size, max_num_seqs, self._leaves[0].dtype)
        self._state = self._new_state()
        self._host_pool = HostPool(num_host_blocks)
        self._said: Array | None = None  # [rows, vocab], see `Penalties`; once a request has penalties
        self._said_shape = (max_num_seqs, model.config.vocab_size)
        self._on_compile = on_compile
        self.compile_seconds: dict[StepShape, float] = {}
        """Of each shape so far: tracing, and compiling or loading from JAX's cache on disk."""

    def start(self, output: SchedulerOutput) -> StepInFlight:
        """Gives the device a step, after those it was given before. If it raises, see `reset`."""
        self._builder.update_rows(output)
        self._count_said(output)
        self._move_blocks(output)
        if not output.num_tokens:
            return StepInFlight(output, None, [])
        shape, inputs = self._builder.build(output)
        is_new = shape not in self.compile_seconds
        if is_new:
            self._on_compile(shape)
        start = time.perf_counter()
        state = self._state._replace(said=self._said if shape.is_penalized else None)
        state, sampled = self._step(
            self._leaves, state, inputs, is_decode=shape.is_decode, num_logprobs=shape.num_logprobs
        )
        if shape.is_penalized:
            self._said = state.said
        self._state = state._replace(said=None)
        if is_new:
            self.compile_seconds[shape] = time.perf_counter() - start
        for array in jax.tree.leaves(sampled):
            array.copy_to_host_async()
        return StepInFlight(output, sampled, self._wanted_prompt_logprobs(output) if shape.prompt_logprobs else [])

    def finish(self, step: StepInFlight) -> StepResult:
        """Waits for a step's samples. If it raises, see `reset`."""
        if step.sampled is None:
            nothing = np.zeros((0, MAX_LOGPROBS))
            return StepResult([], [], nothing.astype(np.int32), nothing.astype(np.float32), [])
        token_ids, logprobs, top_token_ids, top_logprobs, of_prompts = jax.device_get(step.sampled)
        n = len(step.output.samples)
        prompt_logprobs = [
            PromptLogprobs(seq_id, start, *(array[first:end] for array in of_prompts))
            for seq_id, start, first, end in step.wanted
        ]
        return StepResult(
            token_ids[:n].tolist(), logprobs[:n].tolist(), top_token_ids[:n], top_logprobs[:n], prompt_logprobs
        )

    def record(self, output: SchedulerOutput, result: StepResult) -> None:
        """The tokens that a step has sampled are known to the host from here on."""
        samples = output.samples
        for seq_id, row, token_id in zip(samples.seq_ids, samples.rows.tolist(), result.token_ids, strict=True):
            self._builder.rows.record(seq_id, row, token_id)

    def reset(self) -> None:
        """Empties cache and host pool after a failure: they were donated to a step that never came back, or written
        by one that failed. The memory goes before the new is taken."""
        self._said = None
        del self._state
        self._state = self._new_state()
        self._host_pool = HostPool(self._host_pool.num_blocks)

    def _move_blocks(self, output: SchedulerOutput) -> None:
        cache = self._state.cache
        if output.swap_out:
            self._host_pool.store(cache, np.array(output.swap_out, np.int32))
        if output.swap_in:
            cache = self._host_pool.load(cache, np.array(output.swap_in, np.int32))
            self._state = self._state._replace(cache=cache)
        if output.copies:
            pairs = np.array(output.copies, np.int32)
            pairs = pad(pairs, max(MIN_COPIES, power_of_two(len(pairs))), -1)
            self._state = self._state._replace(cache=_copy_blocks(cache, pairs))

    def _count_said(self, output: SchedulerOutput) -> None:
        """What the new occupants of rows with penalties have said before."""
        for new in output.new_rows:
            if isinstance(new.params, SamplingParams) and new.params.has_penalties:
                prompt, generated = new.token_ids[: new.prompt_len], new.token_ids[new.prompt_len :]
                said = np.bincount(np.array(generated, np.intp), minlength=self._said_shape[1]).astype(np.int32)
                said[np.array(prompt, np.intp)] |= IN_PROMPT
                if self._said is None:
                    self._said = jnp.zeros(self._said_shape, jnp.int32)
                self._said = _set_row(self._said, np.int32(new.row), said)

    def _wanted_prompt_logprobs(self, output: SchedulerOutput) -> list[tuple[int, int, int, int]]:
        wanted, end = [], 0
        for sequence in output.sequences:
            first, end = end, end + sequence.num_tokens
            num = self._builder.num_prompt_logprobs(sequence)
            if num:
                wanted.append((sequence.seq_id, sequence.start + 1, first, first + num))
        return wanted


class _State(NamedTuple):
    """What stays on the device between steps, and is donated to each."""

    cache: KVCache
    last_tokens: Array  # int32 [rows]: what each row sampled last
    said: Array | None  # int32 [rows, vocab], in steps with penalties


_copy_blocks = partial(jax.jit, donate_argnums=0)(copy_blocks)


@partial(jax.jit, donate_argnums=0)
def _set_row(said: Array, row: Int32[Array, ""], values: Int32[Array, " V"]) -> Array:
    return said.at[row].set(values)


def _new_state(config: ModelConfig, num_blocks: int, block_size: int, max_num_seqs: int, dtype: np.dtype) -> _State:
    cache = KVCache.create(
        num_layers=config.num_layers,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
    )
    return _State(cache, jnp.zeros(max_num_seqs, jnp.int32), None)


def _step(
    model_of: Callable[[list[Array]], Model],
    leaves: list[Array],
    state: _State,
    inputs: StepInputs,
    *,
    is_decode: bool,
    num_logprobs: int,
) -> tuple[_State, _Sampled]:
    """One step, under `jax.jit`: the model, then the sampler on the tokens that are followed by a sample."""
    model = model_of(leaves)
    inputs = jax.tree.map(jnp.asarray, inputs)
    ids = jnp.where(inputs.token_ids < 0, state.last_tokens[jnp.maximum(-1 - inputs.token_ids, 0)], inputs.token_ids)
    batch = PagedBatch(
        block_tables=inputs.block_tables,
        context_lens=inputs.context_lens,
        query_starts=inputs.query_starts,
        slot_mapping=inputs.slot_mapping,
        num_decodes=inputs.num_decodes,
        max_query_len=1 if is_decode else len(ids),
    )
    hidden, cache = model.step(ids, inputs.positions, state.cache, batch)
    logits = model.logits(hidden[inputs.token_index])
    with jax.named_scope("sample"):
        drawn = _draw(logits, state.said, inputs, ids[inputs.token_index])
        last_tokens = state.last_tokens.at[inputs.rows].set(drawn, mode="drop")
        said = state.said
        if said is not None:
            said = said.at[inputs.rows, drawn].add(1, mode="drop", wrap_negative_indices=False)
        # By the model's own distribution: of the logits as they came.
        of_prompt = None
        if len(inputs.next_prompt_tokens):
            of_prompt = _prompt_logprobs(model, hidden, inputs.next_prompt_tokens, num_logprobs)
        sampled = _Sampled(
            drawn,
            logprobs_of(logits, jnp.maximum(drawn, 0)),
            *top_logprobs(logits, inputs.wants_logprobs, num_logprobs),
            of_prompt,
        )
    return _State(cache, last_tokens, said), sampled


def _draw(logits: Array, said: Array | None, inputs: StepInputs, previous: Array) -> Array:
    """A token a sample by all that is asked, or -1 where nothing is left to draw or the logits are not numbers."""
    asked = inputs.sampling
    if asked.allowed.shape[1]:
        logits = allow(logits, asked.allowed)
    edits = LogitEdits(asked.edit_sample, asked.edit_token, asked.edit_value, asked.edit_after)
    logits = edit(logits, edits, previous)
    if said is not None:
        logits = penalize(logits, Penalties(said.at[inputs.rows].get(mode="clip"), *asked.penalties.T))
    keys = sampling_keys(asked.seed, asked.index, inputs.sample_positions)
    drawn = sample(logits, SamplingBatch(asked.temperature, asked.top_k, asked.top_p, asked.min_p, keys))
    return jnp.where(jnp.isfinite(logits.max(-1)), drawn, -1)


def _prompt_logprobs(model: Model, hidden: Array, following: Array, num_logprobs: int) -> tuple[Array, Array, Array]:
    """The log-probability of the token that follows each of T ones, and the likeliest, a few tokens at a time."""

    def of_tile(tile: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        logits = model.logits(tile[0])
        return logprobs_of(logits, tile[1]), *top_logprobs(logits, jnp.asarray(True), num_logprobs)

    tiles = jax.tree.map(
        lambda array: jnp.pad(array, [(0, -len(array) % LOGITS_TILE)] + [(0, 0)] * (array.ndim - 1)).reshape(
            -1, LOGITS_TILE, *array.shape[1:]
        ),
        (hidden, following),
    )
    found = lax.map(of_tile, tiles)
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[: len(hidden)], found)
