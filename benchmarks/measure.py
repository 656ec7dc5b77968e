"""What the benchmarks on a GPU share: programs compiled side by side, contestants timed in turns, figures kept.

On a CPU everything is small, to show that it works.
"""

import json
import os
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # peers need the card's memory too

import jax
import jax.numpy as jnp

ON_GPU = jax.default_backend() == "gpu"
DTYPE = jnp.bfloat16 if ON_GPU else jnp.float32
REPEATS = 5
WINDOW = 0.02 if ON_GPU else 0.001  # seconds of one measurement: short ones would time the dispatch of the first call

Call = Callable[[], Any]


def compile_all[Name: Hashable](programs: Mapping[Name, tuple[Callable[..., Any], tuple]]) -> dict[Name, Callable]:
    """Each function compiled for its arguments, of which only shapes count. Compilers work beside each other.

    Those that cannot be compiled are named and left out.
    """
    futures, compiled = {}, {}
    with ThreadPoolExecutor() as pool:
        for name, (function, arguments) in programs.items():
            try:
                futures[name] = pool.submit(jax.jit(function).lower(*arguments).compile)
            except (NotImplementedError, ValueError) as error:
                print(f"left out: {name}: {error!r:.200}", flush=True)
    for name, future in futures.items():
        try:
            compiled[name] = future.result()
        except jax.errors.JaxRuntimeError as error:
            print(f"left out: {name}: {error!r:.200}", flush=True)
    return compiled


def seconds[Name: Hashable](calls: Mapping[Name, Call]) -> dict[Name, float]:
    """Of each call: the median over repeats of the mean of many in a row, which the device works off without a gap.

    In each repeat all take turns; a first one, not counted, brings the device's clock up.
    """
    counts = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        counts[name] = max(2, round(WINDOW / _mean(call, 2)))
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(1 + REPEATS):
        for name, call in calls.items():
            times[name].append(_mean(call, counts[name]))
    return {name: median(seen[1:]) for name, seen in times.items()}


def _mean(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count - 1):
        call()
    jax.block_until_ready(call())
    return (time.perf_counter() - start) / count


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy far larger than the caches."""
    x = jnp.ones(2**30 if ON_GPU else 2**22, jnp.bfloat16)
    copy = jax.jit(jnp.copy)  # adding 1 reaches four fifths of it on an H200
    return 2 * x.nbytes / seconds({"copy": lambda: copy(x)})["copy"]


class Figures:
    """Tables of figures: each row is printed once it is known, and saved with all before it."""

    def __init__(self, path: Path | None):
        self.path = path
        self.content: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        print(f"{self.content['device']}, jax {jax.__version__}", flush=True)

    def add(self, table: str, row: Mapping[str, Any]) -> None:
        rows = self.content.setdefault(table, [])
        rows.append(dict(row))
        cells = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        ]
        print(f"{table}: {', '.join(cells)}", flush=True)
        if self.path:
            self.path.write_text(json.dumps(self.content, indent=1))
