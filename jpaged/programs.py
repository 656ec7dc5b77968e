"""The compiled programs of a runner, one for each shape that it has met."""

import time
from collections.abc import Callable, Hashable
from typing import Any


class Programs:
    """Compiles a function once for each key, and calls what it compiled.

    Args:
      on_compile: told the key, as text, before anything is compiled for it, which takes seconds.
    """

    def __init__(self, on_compile: Callable[[str], None]) -> None:
        self._on_compile = on_compile
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self.compile_seconds: dict[Hashable, float] = {}
        """Of each so far: tracing, and compiling or loading from JAX's cache on disk."""

    def __call__(self, key: Hashable, function: Callable[[], Any], *args: Any) -> Any:
        """function()(*args); what function() returns is jitted, and the same for equal keys, as are the shapes of its
        arguments."""
        compiled = self._compiled.get(key)
        if compiled is None:
            self._on_compile(str(key))
            start = time.perf_counter()
            compiled = function().lower(*args).compile()
            self._compiled[key] = compiled
            self.compile_seconds[key] = time.perf_counter() - start
        return compiled(*args)
