"""`LLM`: from a model's name to answers, in two lines."""

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import jax

from .config import EngineConfig
from .llm_engine import EngineStats, LLMEngine
from .outputs import RequestOutput
from .progress import Progress
from .sampling_params import SamplingParams
from .step_inputs import StepShape

Prompt = str | Sequence[int]
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
        self._on_compile: Callable[[StepShape], None] | None = None  # of the call under way
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

        Returns one output a prompt, in order. One that outgrew the cache has `error` set; the others are whole.

        Raises ValueError or TypeError for a prompt or parameter that cannot be served, before anything runs. An
        exception on the way, Ctrl-C too, ends all of the call's requests and leaves the engine usable.
        """
        batch = [prompts] if isinstance(prompts, str) else list(prompts)
        if not batch:
            raise ValueError("prompts: expected at least one, got none")
        if any(isinstance(prompt, int) for prompt in batch):
            raise TypeError("prompts: expected texts or lists of token ids, got token ids: put them in a list")
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

    def stats(self) -> EngineStats:
        """What the engine has done so far."""
        return self.engine.stats()

    def _run(self, batch: list[tuple[Prompt, SamplingParams]], progress: bool) -> list[RequestOutput]:
        if self.engine.has_unfinished():
            raise ValueError("generate: expected an engine without requests of its own under way; step it to their end")
        outputs: dict[str, RequestOutput | None] = {}
        try:
            for i, (prompt, params) in enumerate(batch):
                request_id = next(self._request_ids)
                outputs[request_id] = None
                try:
                    self.engine.add_request(request_id, prompt, params)
                except (TypeError, ValueError) as error:
                    kind = TypeError if isinstance(error, TypeError) else ValueError
                    raise kind(f"prompts[{i}]: {error}") from None
            with Progress(len(batch), self.engine, shown=progress) as bar:
                self._on_compile = bar.compiling
                while not all(outputs.values()):
                    for output in self.engine.step():
                        if output.finished and output.request_id in outputs:
                            outputs[output.request_id] = output
                            bar.finished(output)
                    bar.stepped()
        except BaseException:
            for request_id in outputs:
                self.engine.abort(request_id)
            raise
        finally:
            self._on_compile = None
        return [output for output in outputs.values() if output is not None]

    def _compiling(self, shape: StepShape) -> None:
        if self._on_compile is not None:
            self._on_compile(shape)


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
