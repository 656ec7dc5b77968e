"""The device's side of a step: it holds the weights and the cache, and runs what the scheduler put together."""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels import KVCache, PagedBatch

from .sampler import SamplingBatch, logprobs_of, sample, sampling_keys, top_logprobs
from .scheduler_output import SchedulerOutput
from .step_inputs import StepBuilder, StepInputs, StepShape


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


class StepResult(NamedTuple):
    """What was sampled, in the order of `SchedulerOutput.samples`."""

    token_ids: list[int]
    logprobs: list[float]
    top_token_ids: np.ndarray  # int32 [samples, MAX_LOGPROBS], best first; zeros when no row asked
    top_logprobs: np.ndarray  # float32


class Runner:
    """Runs steps on the device, compiled for few shapes, and in place on a donated cache.

    Args:
      model: see `Model`.
      num_blocks, block_size: of the cache, which takes the dtype of the model's parameters.
      max_num_seqs, max_num_batched_tokens, max_model_len: the scheduler's limits.
      on_compile: told the shape before a step is compiled for it, which takes seconds.
    """

    def __init__(
        self,
        model: Model,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        on_compile: Callable[[StepShape], None] = lambda shape: None,
    ) -> None:
        # A call with flat leaves is dispatched several times faster than one with a module.
        self._leaves, treedef = jax.tree.flatten(model)
        self._step = jax.jit(partial(_step, treedef.unflatten), donate_argnums=(1, 2), static_argnames="is_decode")
        self._builder = StepBuilder(
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
        )
        self._new_state = partial(_new_state, model.config, num_blocks, block_size, max_num_seqs, self._leaves[0].dtype)
        self._cache, self._last_tokens = self._new_state()
        self._on_compile = on_compile
        self.compile_seconds: dict[StepShape, float] = {}
        """Of each shape so far: tracing, and compiling or loading from JAX's cache on disk."""

    def execute(self, output: SchedulerOutput) -> StepResult:
        """Runs one step and waits for its samples. If it raises, the cache is empty."""
        shape, inputs = self._builder.build(output)
        is_new = shape not in self.compile_seconds
        if is_new:
            self._on_compile(shape)
        start = time.perf_counter()
        try:
            self._cache, self._last_tokens, sampled = self._step(
                self._leaves, self._cache, self._last_tokens, inputs, is_decode=shape.is_decode
            )
            if is_new:
                self.compile_seconds[shape] = time.perf_counter() - start
            token_ids, logprobs, top_token_ids, top_logprobs = jax.device_get(sampled)
        except BaseException:
            # Donated to a step that never came back, or written by one that failed: the memory goes before the new.
            del self._cache, self._last_tokens
            self._cache, self._last_tokens = self._new_state()
            raise
        n = len(output.samples)
        return StepResult(token_ids[:n].tolist(), logprobs[:n].tolist(), top_token_ids[:n], top_logprobs[:n])


def _new_state(
    config: ModelConfig, num_blocks: int, block_size: int, max_num_seqs: int, dtype: np.dtype
) -> tuple[KVCache, Array]:
    cache = KVCache.create(
        num_layers=config.num_layers,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
    )
    return cache, jnp.zeros(max_num_seqs, jnp.int32)


def _step(
    model_of: Callable[[list[Array]], Model],
    leaves: list[Array],
    cache: KVCache,
    last_tokens: Int32[Array, " rows"],
    inputs: StepInputs,
    *,
    is_decode: bool,
) -> tuple[KVCache, Array, tuple[Array, Array, Array, Array]]:
    """One step, under `jax.jit`: the model, then the sampler on the tokens that are followed by a sample."""
    model = model_of(leaves)
    inputs = jax.tree.map(jnp.asarray, inputs)
    ids = jnp.where(inputs.token_ids < 0, last_tokens[jnp.maximum(-1 - inputs.token_ids, 0)], inputs.token_ids)
    batch = PagedBatch(
        block_tables=inputs.block_tables,
        context_lens=inputs.context_lens,
        query_starts=inputs.query_starts,
        slot_mapping=inputs.slot_mapping,
        num_decodes=inputs.num_decodes,
        max_query_len=1 if is_decode else len(ids),
    )
    hidden, cache = model.step(ids, inputs.positions, cache, batch)
    logits = model.logits(hidden[inputs.token_index])
    with jax.named_scope("sample"):
        allowed = logits.at[inputs.suppressed[:, 0], inputs.suppressed[:, 1]].set(-jnp.inf, mode="drop")
        keys = sampling_keys(inputs.seed, inputs.sample_index, inputs.sample_positions)
        asked = SamplingBatch(inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p, keys)
        drawn = sample(allowed, asked)
        last_tokens = last_tokens.at[inputs.rows].set(drawn, mode="drop")
        # By the model's own distribution: of the logits as they came.
        sampled = (drawn, logprobs_of(logits, drawn), *top_logprobs(logits, inputs.wants_logprobs))
    return cache, last_tokens, sampled
