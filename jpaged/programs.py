"""The compiled programs of a runner, one for each shape that it has met."""

import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from jax.stages import Lowered, Wrapped


class Program(NamedTuple):
    """What to compile: a function under `jax.jit`, and arguments like those that it will get."""

    function: Wrapped
    arguments: tuple[Any, ...]

    def lower(self) -> Lowered:
        return self.function.lower(*self.arguments)


class Programs:
    """Keeps what was compiled for each key: equal keys stand for equal functions of arguments of equal shapes.

    Args:
      on_compile: told the key, as text, before anything is compiled for it, which takes seconds.
    """

    def __init__(self, on_compile: Callable[[str], None]) -> None:
        self._on_compile = on_compile
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self.compile_seconds = 0.0
        """Spent so far: tracing, and compiling or loading from JAX's cache on disk."""

    def __len__(self) -> int:
        return len(self._compiled)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._compiled

    def __call__(self, key: Hashable, *arguments: Any) -> Any:
        """What the key's program makes of the arguments; KeyError where there is none."""
        return self._compiled[key](*arguments)

    def compile(self, programs: Mapping[Hashable, Program]) -> None:
        """Compiles programs, side by side."""
        for key in programs:
            self._on_compile(str(key))
        start = time.perf_counter()
        # Traced in this thread, whose JAX settings hold.
        lowered = [program.lower() for program in programs.values()]
        with ThreadPoolExecutor(len(lowered)) as pool:
            self._compiled.update(zip(programs, pool.map(Lowered.compile, lowered), strict=True))
        self.compile_seconds += time.perf_counter() - start
