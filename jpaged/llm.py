"""`LLM`: from a model's name to answers, in two lines."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

import jax

from .beam_search_params import BeamSearchParams
from .config import EngineConfig
from .llm_engine import EngineStats, LLMEngine
from .outputs import RequestOutput
from .progress import Progress
from .sampling_params import SamplingParams

Prompt = str | Sequence[int]
Params = SamplingParams | BeamSearchParams
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model with its tokenizer and an engine, for batches of prompts.

    Compiled programs are kept on disk, under `$JPAGED_HOME/xla` (`~/.cache/jpaged` by default), unless JAX's
    `jax_compilation_cache_dir` already says where.

    Args:
      model: what `models.load` takes: a demo model's name (fetched at first use), a GGUF file, a folder with
        safetensors, or an id on the Hugging Face hub.
      config: the fields of `EngineConfig`.

    Raises ValueError for a model that cannot be loaded or a configuration that does not fit, OSError where a
    download fails, TypeError for an unknown argument.

    >>> llm = LLM("smollm2-135m")                                                            # doctest: +SKIP
    >>> llm.generate("The capital of France is", SamplingParams(temperature=0.0))[0].outputs[0].text  # doctest: +SKIP
    ' Paris.'
    """

    def __init__(self, model: str | Path = "smollm2-135m", **config: Any) -> None:
        models = _models()
        self.config = EngineConfig(**config)
        if jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", str(models.home() / "xla"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        dtype = self.config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        weights, self.tokenizer = models.load(model, dtype=dtype)
        self._on_compile: Callable[[str], None] | None = None  # of the call under way
        self.engine = LLMEngine(weights, self.tokenizer, self.config, on_compile=self._compiling)
        self._request_ids = map(str, count())

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answers all prompts in one continuously batched run.

        Args:
          prompts: one text, or a list of texts or of lists of token ids.
          sampling_params: for all of them, or one each; None is `SamplingParams()`.
          progress: show a progress bar and closing statistics on standard error.

        Returns one output a prompt, in order. One that outgrew the cache, or had a part in a step that failed, has
        `error` set; the others are whole.

        Raises ValueError or TypeError for a prompt or parameter that cannot be served, before anything runs. An
        exception on the way, Ctrl-C too, ends all of the call's requests and leaves the engine usable.
        """
        batch = _batch(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(batch)
        else:
            params = list(sampling_params)
        if len(params) != len(batch):
            raise ValueError(f"sampling_params: expected one, or one each for {len(batch)} prompts, got {len(params)}")
        return self._run(list(zip(batch, params, strict=True)), progress)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """The assistant's next turn in a conversation, or in each of a list of conversations.

        Messages are mappings with "role" and "content", rendered by the model's own chat template. Raises
        ValueError for a model without a template, and what `generate` raises.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise TypeError(
                f"messages: expected a list of mappings with role and content, got {type(messages).__name__}"
            )
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Messages], [messages] if is_one else messages)
        return self.generate([self.render_chat(each) for each in conversations], sampling_params, progress=progress)

    def render_chat(self, messages: Messages) -> list[int]:
        """The token ids of a conversation, ready for the assistant's next turn."""
        if self.tokenizer is None:
            raise ValueError("chat: expected a model with a tokenizer, this one has none")
        return self.tokenizer.encode(self.tokenizer.chat(messages), add_special_tokens=False)

    def beam_search(
        self,
        prompts: str | Sequence[Prompt],
        beam_width: int = 4,
        max_tokens: int = 16,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """The likeliest answers to all prompts, `beam_width` each, best first: see `BeamSearchParams`.

        Beams and scores are those of Hugging Face's `generate` with num_beams and num_return_sequences set to
        `beam_width`. Raises what `generate` raises.

        >>> output = llm.beam_search("The capital of France is", beam_width=2)[0]            # doctest: +SKIP
        >>> [answer.text for answer in output.outputs]                                       # doctest: +SKIP
        """
        params = BeamSearchParams(
            beam_width=beam_width, max_tokens=max_tokens, length_penalty=length_penalty, early_stopping=early_stopping
        )
        return self._run([(prompt, params) for prompt in _batch(prompts)], progress)

    def cache_prefix(self, text: Prompt) -> "CachedPrefix":
        """Computes a prefix of prompts to come, and reserves its blocks until `CachedPrefix.release`.

        Prompts that begin with its tokens find all of its full blocks computed, however much else was served in
        between (without a call of this, prefixes are cached too, as long as nobody needs their blocks). Raises
        ValueError or TypeError for what cannot be a prompt, or where prefix caching is off; RuntimeError where the
        prefix does not fit the cache.

        >>> prefix = llm.cache_prefix("You are a helpful assistant. ")                       # doctest: +SKIP
        >>> outputs = llm.generate(["You are a helpful assistant. Hi!"])                     # doctest: +SKIP
        >>> prefix.release()                                                                 # doctest: +SKIP
        """
        self._expect_idle("cache_prefix")
        prefix_id = f"prefix-{next(self._request_ids)}"
        self.engine.add_prefix(prefix_id, text)
        (output,) = self._finish([prefix_id])
        if output.error is not None:
            raise RuntimeError(f"cache_prefix: {output.error}")
        block_size = self.config.block_size
        num_tokens = len(output.prompt_token_ids) // block_size * block_size
        return CachedPrefix(num_tokens, lambda: self.engine.release_prefix(prefix_id))

    def stats(self) -> EngineStats:
        """What the engine has done so far."""
        return self.engine.stats()

    def _run(self, batch: list[tuple[Prompt, Params]], progress: bool) -> list[RequestOutput]:
        self._expect_idle("generate")
        request_ids: list[str] = []
        try:
            for i, (prompt, params) in enumerate(batch):
                request_ids.append(next(self._request_ids))
                try:
                    self.engine.add_request(request_ids[-1], prompt, params)
                except (TypeError, ValueError) as error:
                    kind = TypeError if isinstance(error, TypeError) else ValueError
                    raise kind(f"prompts[{i}]: {error}") from None
            with Progress(len(batch), self.engine, shown=progress) as bar:
                return self._finish(request_ids, bar)
        except BaseException:
            for request_id in request_ids:
                self.engine.abort(request_id)
            raise

    def _finish(self, request_ids: list[str], bar: Progress | None = None) -> list[RequestOutput]:
        """Steps until these requests have ended; aborts them if it raises."""
        outputs: dict[str, RequestOutput] = {}
        self._on_compile = bar and bar.compiling
        try:
            while len(outputs) < len(request_ids):
                for output in self.engine.step(only_finished=True):
                    if output.request_id in request_ids:
                        outputs[output.request_id] = output
                        if bar is not None:
                            bar.finished(output)
                if bar is not None:
                    bar.stepped()
        except BaseException:
            for request_id in request_ids:
                self.engine.abort(request_id)
            raise
        finally:
            self._on_compile = None
        return [outputs[request_id] for request_id in request_ids]

    def _expect_idle(self, function: str) -> None:
        if self.engine.has_unfinished():
            raise ValueError(
                f"{function}: expected an engine without requests of its own under way; step it to their end"
            )

    def _compiling(self, what: str) -> None:
        if self._on_compile is not None:
            self._on_compile(what)


@dataclass(frozen=True)
class CachedPrefix:
    """The blocks of a prefix, reserved by `LLM.cache_prefix`."""

    num_tokens: int
    """Those of its tokens that fill blocks: what a prompt that begins with the prefix does not compute."""
    release: Callable[[], None] = field(repr=False)
    """Gives the blocks back: they stay cached until they are needed. KeyError the second time, or where a failed step
    has cost the engine its cache."""


def _batch(prompts: str | Sequence[Prompt]) -> list[Prompt]:
    batch = [prompts] if isinstance(prompts, str) else list(prompts)
    if not batch:
        raise ValueError("prompts: expected at least one, got none")
    if any(isinstance(prompt, int) for prompt in batch):
        raise TypeError("prompts: expected texts or lists of token ids, got token ids: put them in a list")
    return cast(list[Prompt], batch)


def _models() -> ModuleType:
    """Our package `models`. The name is a common one, and the first on `sys.path` wins."""
    try:
        import models
        from models.load import load as _  # noqa: F401
    except ImportError as error:
        found = getattr(sys.modules.get("models"), "__file__", None)
        raise ImportError(
            f"LLM needs the package `models` that is installed with jpaged, and found {found or 'none'}: {error}. "
            "Rename or move what is in its way on sys.path."
        ) from error
    return models
