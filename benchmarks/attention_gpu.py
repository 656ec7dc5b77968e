"""flash_attention on a Hopper GPU, beside cuDNN and PyTorch in the same run.

    python benchmarks/attention_gpu.py [--lengths 2048,4096,8192,16384] [--peer-python PATH/TO/python] [--json FILE]

Attention: bf16, batch * length = 16,384, heads * head dim = 2,048; 4 T^2 H operations a head forward, 2.5 times that
backward, half of it where causal. Backward is forward and backward less forward. Each figure is the median over
repeats of the mean of ten calls, and the contestants take turns in each repeat. PyTorch runs in a process of its own.
On a CPU it runs at small size with the xla kernels, to show that it works.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from pallas_kernels import flash_attention

TOKENS, WIDTH = 16_384, 2_048
CALLS, REPEATS = 10, 5


@dataclass(frozen=True)
class Problem:
    head_dim: int
    length: int
    causal: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return max(TOKENS // self.length, 1), self.length, WIDTH // self.head_dim, self.head_dim

    @property
    def forward_flops(self) -> float:
        batch, length, heads, head_dim = self.shape
        return 4.0 * batch * heads * length**2 * head_dim / (2 if self.causal else 1)


@dataclass(frozen=True)
class Figure:
    """TFLOP/s of one contestant on one problem; backward None where it was not asked for."""

    contestant: str
    problem: Problem
    forward: float
    backward: float | None


def seconds(call: Callable[[], Any]) -> float:
    """Mean of CALLS calls in a row; the device works them off without a gap."""
    start = time.perf_counter()
    results = [call() for _ in range(CALLS)]
    jax.block_until_ready(results[-1])
    return (time.perf_counter() - start) / CALLS


def calls_of(implementation: Any, problem: Problem) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(forward, forward and backward), compiled and warm."""
    dtype = jnp.float32 if implementation == "xla" else jnp.bfloat16
    query, key, value, cotangent = (
        jnp.asarray(np.random.default_rng(i).standard_normal(problem.shape, np.float32), dtype) for i in range(4)
    )
    attend: Any = partial(flash_attention, is_causal=problem.causal, implementation=implementation)
    forward = jax.jit(attend)

    @jax.jit
    def both(query, key, value, cotangent):
        return jax.vjp(attend, query, key, value)[1](cotangent)

    calls = partial(forward, query, key, value), partial(both, query, key, value, cotangent)
    for call in calls:
        jax.block_until_ready(call())
    return calls


def measure(problem: Problem, implementations: list[str], backward: bool) -> list[Figure]:
    calls = {name: calls_of(name, problem) for name in implementations}
    times: dict[tuple[str, int], list[float]] = {(name, i): [] for name in calls for i in range(1 + backward)}
    for _ in range(REPEATS):
        for (name, i), seen in times.items():
            seen.append(seconds(calls[name][i]))
    figures = []
    for name in calls:
        forward = median(times[name, 0])
        both = median(times[name, 1]) if backward else None
        figures.append(
            Figure(
                name,
                problem,
                problem.forward_flops / forward / 1e12,
                None if both is None else 2.5 * problem.forward_flops / (both - forward) / 1e12,
            )
        )
    return figures


def measure_peer(python: str, problems: list[Problem]) -> list[Figure]:
    """PyTorch's attention backends, by `torch_attention_peer.py`."""
    script = Path(__file__).with_name("torch_attention_peer.py")
    given = json.dumps([{"shape": p.shape, "causal": p.causal} for p in problems])
    result = subprocess.run([python, str(script)], input=given, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{script.name} failed:\n{result.stderr}")
    figures = []
    for line in json.loads(result.stdout):
        problem = problems[line["problem"]]
        flops = problem.forward_flops / 1e12
        figures.append(Figure(line["name"], problem, flops / line["forward"], 2.5 * flops / line["backward"]))
    return figures


def show(figures: list[Figure]) -> None:
    table = Table("head dim", "length", "causal", "contestant", "forward TFLOP/s", "backward TFLOP/s")
    for figure in sorted(figures, key=lambda f: (f.problem.head_dim, f.problem.causal, f.problem.length)):
        backward = "" if figure.backward is None else f"{figure.backward:.0f}"
        problem = figure.problem
        table.add_row(
            str(problem.head_dim),
            str(problem.length),
            "yes" if problem.causal else "no",
            figure.contestant,
            f"{figure.forward:.0f}",
            backward,
        )
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = jax.default_backend() == "gpu"
    parser.add_argument("--lengths", default="2048,4096,8192,16384" if on_gpu else "256")
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--no-backward", action="store_true")
    parser.add_argument("--peer-python", help="a Python with PyTorch, to measure its attention too")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    problems = [
        Problem(head_dim, length, causal)
        for head_dim in map(int, arguments.head_dims.split(","))
        for causal in (False, True)
        for length in map(int, arguments.lengths.split(","))
    ]
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, Python {sys.version.split()[0]}")
    implementations = ["mosaic", "cudnn"] if on_gpu else ["xla"]
    figures = [f for p in problems for f in measure(p, implementations, not arguments.no_backward)]
    if arguments.peer_python:
        figures += measure_peer(arguments.peer_python, problems)
    show(figures)
    if arguments.json:
        content = {"device": device, "jax": jax.__version__, "figures": [asdict(f) for f in figures]}
        arguments.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
