"""flash_attention on a CPU beside `jax.nn.dot_product_attention` and the machine's own matmuls, in one run.

    python benchmarks/attention_cpu.py [--lengths 1024,2048,4096,8192] [--repeats 7] [--json FILE]

float32, one sequence, 4 heads of 64. The contestants, each a process, take turns in each repeat; figures are medians.
GFLOP/s count 4 T^2 N H operations forward and 3.5 times that with backward, half of it where causal. *matmul* is what
`a @ b` of 2048 x 2048 reaches in the same turns. Block-sparse rows compare with the same kernel where all blocks are
kept: *of proportional* is time over (time with all blocks x fraction kept), 1 where cost follows the fraction.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from pallas_kernels import BlockMask, flash_attention

HEADS, HEAD_DIM, MATMUL = 4, 64, 2048
WARM_UP = 0.5  # seconds

Attend = Callable[..., jax.Array]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Dense:
    """Seconds of one length."""

    length: int
    causal: bool
    forward: float
    peer_forward: float
    both: float  # forward and backward
    peer_both: float
    matmul: float

    @property
    def flops(self) -> float:
        return 4.0 * HEADS * HEAD_DIM * self.length**2 / (2 if self.causal else 1)

    @property
    def matmul_rate(self) -> float:
        return 2 * MATMUL**3 / self.matmul


@dataclass(frozen=True)
class Sparse:
    """Seconds of one mask, and of all its blocks."""

    pattern: str
    block: int
    kept: float
    forward: float
    full_forward: float
    both: float
    full_both: float


def arrays(length: int) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((1, length, HEADS, HEAD_DIM), np.float32)) for _ in range(4)]


def calls_of(attend: Attend, length: int) -> list[Call]:
    """Forward, and forward with backward."""
    query, key, value, cotangent = arrays(length)

    @jax.jit
    def both(query, key, value, cotangent):
        return jax.vjp(attend, query, key, value)[1](cotangent)

    return [partial(jax.jit(attend), query, key, value), partial(both, query, key, value, cotangent)]


def matmul_call() -> list[Call]:
    square = jnp.ones((MATMUL, MATMUL), jnp.float32)
    return [partial(jax.jit(jnp.matmul), square, square)]


def block_masks(length: int, block: int) -> dict[str, BlockMask]:
    sizes = {"block_q": block, "block_kv": block}
    return {
        "full": BlockMask.full(length, length, **sizes),
        "butterfly": BlockMask.butterfly(length, length, **sizes),
        "local": BlockMask.local(length, length, width=2, **sizes),
        "strided": BlockMask.strided(length, length, stride=4, **sizes),
    }


def sparse_calls(length: int, block: int) -> list[Call]:
    """Two a mask."""
    masks = block_masks(length, block).values()
    attends = [partial(flash_attention, block_mask=mask, implementation="xla") for mask in masks]
    return [call for attend in attends for call in calls_of(attend, length)]


def work(connection: Connection, make: Callable[[], list[Call]]) -> None:
    """A contestant's process: makes its calls and says how many, then sends the seconds of each that it is asked for.

    Only the last call of a turn counts: before it come half a second of others, since what wakes up is slow at first.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        calls = make()
        connection.send(len(calls))
        while (number := connection.recv()) is not None:
            begin = time.perf_counter()
            while time.perf_counter() - begin < WARM_UP:
                jax.block_until_ready(calls[number]())
            start = time.perf_counter()
            jax.block_until_ready(calls[number]())
            connection.send(time.perf_counter() - start)


@contextmanager
def contestant(make: Callable[[], list[Call]]) -> Iterator[Connection]:
    """A process that `work`s: its memory is not what another contestant has left behind."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, make), daemon=True)
    process.start()
    theirs.close()  # so that a process that has died is seen at this end
    try:
        yield ours
        ours.send(None)
        process.join()
    finally:
        process.kill()


def seconds(contestants: Sequence[Callable[[], list[Call]]], repeats: int) -> list[float]:
    """The median of each call of each contestant, which take turns."""
    with ExitStack() as stack:
        connections = [stack.enter_context(contestant(make)) for make in contestants]
        calls = [(connection, number) for connection in connections for number in range(connection.recv())]
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(repeats):
            for (connection, number), seen in zip(calls, times, strict=True):
                connection.send(number)
                seen.append(connection.recv())
    return [median(seen) for seen in times]


def measure_dense(length: int, causal: bool, repeats: int) -> Dense:
    attends = [
        partial(attend, is_causal=causal, implementation="xla")
        for attend in (flash_attention, jax.nn.dot_product_attention)
    ]
    contestants = [*(partial(calls_of, attend, length) for attend in attends), matmul_call]
    forward, both, peer_forward, peer_both, matmul = seconds(contestants, repeats)
    return Dense(length, causal, forward, peer_forward, both, peer_both, matmul)


def measure_sparse(length: int, block: int, repeats: int) -> list[Sparse]:
    times = seconds([partial(sparse_calls, length, block)], repeats)
    return [
        Sparse(name, block, float(mask.density), times[2 * i], times[0], times[2 * i + 1], times[1])
        for i, (name, mask) in enumerate(block_masks(length, block).items())
        if i
    ]


def show_dense(console: Console, figures: list[Dense]) -> None:
    table = Table("length", "causal", "forward ms", "jax.nn ms", "ratio", "with backward ms", "jax.nn ms", "ratio",
                  "forward GFLOP/s", "both GFLOP/s", "matmul GFLOP/s", "forward/matmul")  # fmt: skip
    for f in figures:
        rate = f.flops / f.forward
        table.add_row(
            str(f.length), "yes" if f.causal else "no",
            f"{f.forward * 1e3:.1f}", f"{f.peer_forward * 1e3:.1f}", f"{f.peer_forward / f.forward:.2f}",
            f"{f.both * 1e3:.1f}", f"{f.peer_both * 1e3:.1f}", f"{f.peer_both / f.both:.2f}",
            f"{rate / 1e9:.0f}", f"{3.5 * f.flops / f.both / 1e9:.0f}", f"{f.matmul_rate / 1e9:.0f}",
            f"{rate / f.matmul_rate:.2f}",
        )  # fmt: skip
    console.print(table)


def show_sparse(console: Console, length: int, figures: list[Sparse]) -> None:
    table = Table("block-sparse", "length", "block", "kept", "forward ms", "all blocks ms", "of proportional",
                  "with backward ms", "all blocks ms", "of proportional")  # fmt: skip
    for f in figures:
        table.add_row(
            f.pattern, str(length), str(f.block), f"{f.kept:.3f}",
            f"{f.forward * 1e3:.1f}", f"{f.full_forward * 1e3:.1f}", f"{f.forward / (f.full_forward * f.kept):.2f}",
            f"{f.both * 1e3:.1f}", f"{f.full_both * 1e3:.1f}", f"{f.both / (f.full_both * f.kept):.2f}",
        )  # fmt: skip
    console.print(table)


def processor() -> str:
    """Its name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    parser.add_argument("--sparse-length", type=int, default=8192, help="0: no block-sparse rows")
    parser.add_argument("--blocks", default="128,256,512", help="block sizes of the block-sparse rows")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    console = Console(width=150)
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    console.print(f"jax {jax.__version__}, {processor()}, {os.cpu_count()} CPUs, load before the run {load}")
    lengths = [int(length) for length in arguments.lengths.split(",")]
    dense = [measure_dense(length, causal, arguments.repeats) for length in lengths for causal in (False, True)]
    show_dense(console, dense)
    sparse = []
    for block in arguments.blocks.split(",") if arguments.sparse_length else []:
        sparse += measure_sparse(arguments.sparse_length, int(block), arguments.repeats)
    if sparse:
        show_sparse(console, arguments.sparse_length, sparse)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(figure) for figure in [*dense, *sparse]], indent=1))


if __name__ == "__main__":
    main()
