"""An LLM engine in JAX: continuous batching over a paged KV cache."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .beam_search_params import BeamSearchParams as BeamSearchParams
    from .config import EngineConfig as EngineConfig
    from .generation import GenerateOutput as GenerateOutput
    from .generation import generate as generate
    from .llm import LLM as LLM
    from .llm import CachedPrefix as CachedPrefix
    from .llm_engine import EngineStats as EngineStats
    from .llm_engine import LLMEngine as LLMEngine
    from .outputs import CompletionOutput as CompletionOutput
    from .outputs import RequestMetrics as RequestMetrics
    from .outputs import RequestOutput as RequestOutput
    from .sampling_params import SamplingParams as SamplingParams

# Loaded when first asked for, so that the host side (`jpaged.scheduler`, say) can be used without JAX.
_HOME = {
    "BeamSearchParams": "beam_search_params",
    "EngineConfig": "config",
    "GenerateOutput": "generation",
    "generate": "generation",
    "CachedPrefix": "llm",
    "LLM": "llm",
    "EngineStats": "llm_engine",
    "LLMEngine": "llm_engine",
    "CompletionOutput": "outputs",
    "RequestMetrics": "outputs",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
