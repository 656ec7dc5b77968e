"""The device's side of a step: it holds the weights and the cache, and runs what the scheduler put together."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels import HostPool, KVCache, PagedBatch, copy_blocks

from .packing import Layout, layout_of, pack, unpack
from .programs import Program, Programs
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
from .sampling_rows import SamplingInputs, SamplingShape, pad, power_of_two
from .scheduler_output import SchedulerOutput
from .step_inputs import Step, StepBuilder, StepInputs, StepShape

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
    top_token_ids: np.ndarray  # int32 [samples, n], best first; n is 0 when no row asked
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
    top: tuple[Array, Array] | None  # the likeliest tokens and their logprobs, where a row asks
    prompt_logprobs: tuple[Array, Array, Array] | None


class PromptShape(NamedTuple):
    """What the ranking of a prompt's tokens is compiled for."""

    tokens: int

    def __str__(self) -> str:
        return f"the logprobs of a prompt's {self.tokens} tokens"


class Runner:
    """Runs steps on the device, compiled for few shapes, and in place on a donated cache.

    Args:
      model: see `Model`.
      num_blocks, block_size: of the cache, which takes the dtype of the model's parameters.
      num_host_blocks: of the pool in the host's memory that blocks are swapped to.
      max_num_seqs, max_num_batched_tokens, max_model_len: the scheduler's limits.
      batch_invariant: see `EngineConfig`.
      on_compile: told what is to be compiled, "a step of 64 tokens", before that is done, which takes seconds.
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
        on_compile: Callable[[str], None] = lambda what: None,
    ) -> None:
        # A call with flat leaves is dispatched several times faster than one with a module.
        self._leaves, treedef = jax.tree.flatten(model)
        self._model_of = treedef.unflatten
        self._programs = Programs(on_compile)
        self._builder = StepBuilder(
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            vocab_size=model.config.vocab_size,
            batch_invariant=batch_invariant,
        )
        self._new_cache = partial(_new_cache, model.config, num_blocks, block_size, self._leaves[0].dtype)
        self._num_host_blocks = num_host_blocks
        self._said_shape = (max_num_seqs, model.config.vocab_size)
        self._start_empty()

    @property
    def num_programs(self) -> int:
        """How many were compiled."""
        return len(self._programs)

    @property
    def compile_seconds(self) -> float:
        """Of all programs: tracing, and compiling or loading from JAX's cache on disk."""
        return self._programs.compile_seconds

    def start(self, output: SchedulerOutput, num_unfinished: int = 1) -> StepInFlight:
        """Gives the device a step, after those it was given before. If it raises, see `reset`.

        Where the step has to be compiled for a CPU, so are the decodes of as many sequences as are unfinished, beside
        it. Not so for a GPU: its compiler times the kernels it chooses from, and needs the device to itself.
        """
        self._builder.update_rows(output)
        self._count_said(output)
        self._move_blocks(output)
        if not output.num_tokens:
            return StepInFlight(output, None, [])
        step = self._builder.build(output)
        if step.shape not in self._programs:
            shapes = [step.shape]
            if jax.default_backend() == "cpu":
                shapes.append(self._builder.decode_shape(num_unfinished))
            new = [shape for shape in shapes if shape not in self._programs]
            self._programs.compile({shape: self._model_program(shape) for shape in new})
        hidden, logits, followed = self._run_model(step)
        sampled = self._sample(step, logits, followed)
        if step.next_prompt_tokens is not None:
            sampled = sampled._replace(prompt_logprobs=self._rank_prompt(hidden, step.next_prompt_tokens))
        for array in jax.tree.leaves(sampled):
            array.copy_to_host_async()
        wanted = [] if sampled.prompt_logprobs is None else self._wanted_prompt_logprobs(output)
        return StepInFlight(output, sampled, wanted)

    def finish(self, step: StepInFlight) -> StepResult:
        """Waits for a step's samples. If it raises, see `reset`."""
        n = len(step.output.samples)
        if step.sampled is None:
            return StepResult([], [], *_nothing_ranked(n), [])
        token_ids, logprobs, top, of_prompts = jax.device_get(step.sampled)
        top_token_ids, top_logprobs = top or _nothing_ranked(n)
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
        del self._said, self._cache
        self._start_empty()

    def _start_empty(self) -> None:
        self._said: Array | None = None  # [rows, vocab], see `Penalties`; once a request has penalties
        self._cache = self._new_cache()
        self._last_tokens = jnp.zeros(self._said_shape[0], jnp.int32)  # what each row sampled last
        self._host_pool = HostPool(self._num_host_blocks)

    def _model_program(self, shape: StepShape) -> Program:
        """See `_run_model`."""
        inputs = self._builder.blank(shape)
        function = partial(_run_model, self._model_of, shape.is_decode, layout_of(inputs))
        return Program(jax.jit(function, donate_argnums=1), self._model_arguments(inputs))

    def _model_arguments(self, inputs: StepInputs) -> tuple[Any, ...]:
        return self._leaves, (self._cache.keys, self._cache.values), self._last_tokens, pack(inputs)

    def _run_model(self, step: Step) -> tuple[Array, Array, Array]:
        """The final hidden states, and of each sample the logits and the token before it."""
        pages, hidden, logits, followed = self._programs(step.shape, *self._model_arguments(step.inputs))
        self._cache = KVCache(*pages)
        return hidden, logits, followed

    def _sample(self, step: Step, logits: Array, followed: Array) -> _Sampled:
        """Draws a step's samples, and remembers them for the next step."""
        shape = step.sampling_shape
        said = self._said if shape.is_penalized else None
        arguments = self._last_tokens, said, logits, followed, pack(step.sampling)
        if shape not in self._programs:
            function = partial(_sample, shape, layout_of(step.sampling))
            self._programs.compile({shape: Program(jax.jit(function, donate_argnums=(0, 1)), arguments)})
        self._last_tokens, said, sampled = self._programs(shape, *arguments)
        if shape.is_penalized:
            self._said = said
        return sampled

    def _rank_prompt(self, hidden: Array, following: np.ndarray) -> tuple[Array, Array, Array]:
        """See `_prompt_logprobs`."""
        shape, arguments = PromptShape(len(following)), (self._leaves, hidden, following)
        if shape not in self._programs:
            self._programs.compile({shape: Program(jax.jit(partial(_prompt_logprobs, self._model_of)), arguments)})
        return self._programs(shape, *arguments)

    def _move_blocks(self, output: SchedulerOutput) -> None:
        if output.swap_out:
            self._host_pool.store(self._cache, np.array(output.swap_out, np.int32))
        if output.swap_in:
            self._cache = self._host_pool.load(self._cache, np.array(output.swap_in, np.int32))
        if output.copies:
            pairs = np.array(output.copies, np.int32)
            pairs = pad(pairs, max(MIN_COPIES, power_of_two(len(pairs))), -1)
            self._cache = _copy_blocks(self._cache, pairs)

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


_copy_blocks = partial(jax.jit, donate_argnums=0)(copy_blocks)


@partial(jax.jit, donate_argnums=0)
def _set_row(said: Array, row: Int32[Array, ""], values: Int32[Array, " V"]) -> Array:
    return said.at[row].set(values)


def _new_cache(config: ModelConfig, num_blocks: int, block_size: int, dtype: np.dtype) -> KVCache:
    return KVCache.create(
        num_layers=config.num_layers,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
    )


def _nothing_ranked(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((n, 0), np.int32), np.zeros((n, 0), np.float32)


def _run_model(
    model_of: Callable[[list[Array]], Model],
    is_decode: bool,
    layout: Layout,
    leaves: list[Array],
    pages: tuple[Array, Array],  # the cache's
    last_tokens: Array,
    packed: Array,
) -> tuple[tuple[Array, Array], Array, Array, Array]:
    """A step's tokens through the model; see `Runner._run_model`."""
    model, inputs = model_of(leaves), StepInputs(*unpack(packed, layout))
    ids = jnp.where(inputs.token_ids < 0, last_tokens[jnp.maximum(-1 - inputs.token_ids, 0)], inputs.token_ids)
    batch = PagedBatch(
        block_tables=inputs.block_tables,
        context_lens=inputs.context_lens,
        query_starts=inputs.query_starts,
        slot_mapping=inputs.slot_mapping,
        num_decodes=inputs.num_decodes,
        max_query_len=1 if is_decode else len(ids),
    )
    hidden, cache = model.step(ids, inputs.positions, KVCache(*pages), batch)
    return (cache.keys, cache.values), hidden, model.logits(hidden[inputs.token_index]), ids[inputs.token_index]


def _sample(
    shape: SamplingShape,
    layout: Layout,
    last_tokens: Array,
    said: Array | None,
    logits: Array,
    followed: Array,
    packed: Array,
) -> tuple[Array, Array | None, _Sampled]:
    """A step's logits to tokens; see `Runner._sample`."""
    inputs = SamplingInputs(*unpack(packed, layout))
    drawn = _draw(shape, inputs, logits, said, followed)
    last_tokens = last_tokens.at[inputs.rows].set(drawn, mode="drop")
    if said is not None:
        said = said.at[inputs.rows, drawn].add(1, mode="drop", wrap_negative_indices=False)
    # By the model's own distribution: of the logits as they came.
    logprobs = logprobs_of(logits, jnp.maximum(drawn, 0))
    top = top_logprobs(logits, shape.num_logprobs) if shape.num_logprobs else None
    return last_tokens, said, _Sampled(drawn, logprobs, top, None)


def _draw(shape: SamplingShape, asked: SamplingInputs, logits: Array, said: Array | None, followed: Array) -> Array:
    """A token a sample by all that is asked, or -1 where nothing is left to draw or the logits are not numbers."""
    if shape.is_restricted:
        logits = allow(logits, asked.allowed)
    if shape.edits:
        edits = LogitEdits(asked.edit_sample, asked.edit_token, asked.edit_value, asked.edit_after)
        logits = edit(logits, edits, followed)
    if said is not None:
        logits = penalize(logits, Penalties(said.at[asked.rows].get(mode="clip"), *asked.penalties.T))
    keys = sampling_keys(asked.seed, asked.index, asked.positions)
    batch = SamplingBatch(asked.temperature, asked.top_k, asked.top_p, asked.min_p, keys)
    drawn = sample(logits, batch, draws=shape.draws, cuts=shape.cuts)
    return jnp.where(jnp.isfinite(logits.max(-1)), drawn, -1)


def _prompt_logprobs(
    model_of: Callable[[list[Array]], Model], leaves: list[Array], hidden: Array, following: Array
) -> tuple[Array, Array, Array]:
    """The log-probability of the token that follows each of T ones, and the likeliest, a few tokens at a time."""
    model = model_of(leaves)

    def of_tile(tile: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        logits = model.logits(tile[0])
        return logprobs_of(logits, tile[1]), *top_logprobs(logits, MAX_LOGPROBS)

    tiles = jax.tree.map(
        lambda array: jnp.pad(array, [(0, -len(array) % LOGITS_TILE)] + [(0, 0)] * (array.ndim - 1)).reshape(
            -1, LOGITS_TILE, *array.shape[1:]
        ),
        (hidden, following),
    )
    found = lax.map(of_tile, tiles)
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[: len(hidden)], found)
