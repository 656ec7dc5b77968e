"""What `jpaged compile` prints: the kernels of `kernel_list`, compiled for a GPU that need not be there."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from pallas_kernels import aot
from pallas_kernels.gpu import GPUS
from pallas_kernels.hopper_cost import RoundCost, matmul_shape, round_cost

from .kernel_list import Entry, kernel_list


@dataclass(frozen=True)
class Result:
    """An entry, compiled; or the error for which it is not."""

    entry: Entry
    gpu: str
    report: aot.Report | None
    bytes: float
    error: str | None = None

    @property
    def faults(self) -> list[str]:
        if self.error is not None:
            return [self.error]
        return self.report.faults(self.entry.pending) if self.report else []

    @property
    def matmul_time(self) -> float:
        """Seconds that the matmuls take at the GPU's dense rate."""
        return self.entry.flops / GPUS[self.gpu].flops

    @property
    def memory_time(self) -> float:
        """Seconds that the bytes take at the GPU's bandwidth."""
        return self.bytes / GPUS[self.gpu].bandwidth

    @property
    def bound(self) -> str:
        """Which of the two holds."""
        return "compute" if self.matmul_time > self.memory_time else "memory"

    @property
    def time(self) -> float:
        """Seconds that it takes at least."""
        return max(self.matmul_time, self.memory_time)


def select(words: Sequence[str]) -> list[Entry]:
    """The entries whose names contain each of the words. Raises ValueError where there is none."""
    entries = kernel_list()
    selected = [entry for entry in entries if all(word in entry.name for word in words)]
    if not selected:
        names = ", ".join(sorted({word for entry in entries for word in entry.name.split()}))
        raise ValueError(f"expected words of the kernels' names ({names}), got {' '.join(words)}")
    return selected


def compile_entries(entries: Sequence[Entry], gpu: str, console: Console) -> Iterator[Result]:
    """Each entry's result, as it comes. Raises what `aot.mesh` does."""
    mesh = aot.mesh(gpu)
    with console.status("") as status:
        for number, entry in enumerate(entries, 1):
            status.update(f"{entry.name} ({number} of {len(entries)})")
            yield compile_entry(entry, gpu, mesh)


def compile_entry(entry: Entry, gpu: str, mesh: jax.sharding.Mesh) -> Result:
    """Compiles it; whatever goes wrong becomes the result's error."""
    try:
        with jax.set_mesh(mesh):
            function, arguments = entry.build()
        report = aot.compile(function, *arguments, gpu=gpu, devices=mesh)
    except Exception as error:
        return Result(entry, gpu, None, entry.bytes or 0.0, f"{type(error).__name__}: {error}".partition("\n")[0])
    memory = report.memory
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return Result(entry, gpu, report, moved if entry.bytes is None else entry.bytes)


def tile(kernel: aot.Kernel) -> str:
    """Rows and columns of the products that a warpgroup computes in one go, as its wgmma instructions have them."""
    shapes = dict.fromkeys(shape[:2] for i in kernel.sass.instructions if (shape := matmul_shape(i)))
    return ", ".join(f"{m}x{n}" for m, n in shapes)


def kernel_table(results: Sequence[Result], gpu: str) -> Table:
    """A row a kernel: what it takes of the GPU; and a program's roofline in the row of its first kernel."""
    table = Table(title=f"Compiled for {GPUS[gpu].device_kind}")
    table.add_column("program")
    table.add_column("kernel")
    table.add_column("wgmma tile")
    for name in ("registers", "spills B", "shared KB", "warpgroups", "HGMMA", "TMA in/out", "GFLOP", "MB"):
        table.add_column(name, justify="right")
    table.add_column("bound")
    table.add_column("at least µs", justify="right")
    for result in results:
        roofline = (
            f"{result.entry.flops / 1e9:.1f}",
            f"{result.bytes / 1e6:.1f}",
            result.bound,
            f"{result.time * 1e6:.1f}",
        )
        name = f"[red]{result.entry.name}" if result.faults else result.entry.name
        kernels = result.report.kernels if result.report else ()
        if not kernels:
            table.add_row(name, "failed" if result.error else "none", *[""] * 7, *roofline)
        for number, kernel in enumerate(kernels):
            table.add_row(
                *(
                    "" if number else name,
                    kernel.name,
                    tile(kernel),
                    str(kernel.registers),
                    str(kernel.spill_stores + kernel.spill_loads),
                    f"{kernel.shared_memory / 1024:.1f}",
                    str(kernel.warpgroups),
                    str(kernel.hgmma),
                    f"{kernel.tma_loads}/{kernel.tma_stores}",
                ),
                *([""] * 4 if number else roofline),
            )
    return table


def inner_loops(kernel: aot.Kernel) -> Iterator[tuple[str, RoundCost]]:
    """The costs of a round of each inner loop around wgmma, the cheapest and the dearest."""
    for loop in kernel.sass.inner_loops:
        yield "plain", round_cost(loop.shortest())
        yield "masked", round_cost(loop.longest())


def loop_table(results: Sequence[Result], gpu: str) -> Table:
    """A row for each way through an inner loop: its instructions, its cycles, and the rate that they allow."""
    table = Table(
        title="Inner loops: instructions of one round of a warpgroup, and cycles of the units that they keep busy"
    )
    for name in ("program", "kernel", "round"):
        table.add_column(name)
    counted = {"HGMMA": ("HGMMA",), "MUFU": ("MUFU",), "FMA": ("FFMA", "FMUL", "FADD"), "FMNMX": ("FMNMX",)}
    for name in ("all", *counted, "tensor", "shared", "issue", "MUFU", "FMA", "ALU", "bound TFLOP/s"):
        table.add_column(name, justify="right")
    for result in results:
        for kernel in result.report.kernels if result.report else ():
            for name, cost in inner_loops(kernel):
                numbers = [cost.counts.total(), *(sum(cost.counts[op] for op in ops) for ops in counted.values())]
                cycles = [round(cost.tensor), round(cost.shared), cost.issue, cost.special, cost.fma, cost.alu]
                rate = cost.bound(kernel.warpgroups - 1) * GPUS[gpu].flops / 1e12
                table.add_row(result.entry.name, kernel.name, name, *map(str, numbers + cycles), f"{rate:.0f}")
    return table


def record(result: Result) -> str:
    """A line of JSON."""
    fields: dict[str, Any] = {
        "program": result.entry.name,
        "gpu": result.gpu,
        "flops": result.entry.flops,
        "bytes": result.bytes,
        "bound": result.bound,
        "seconds": result.time,
        "faults": result.faults,
        "kernels": [],
    }
    if result.report:
        fields["temporary_bytes"] = result.report.memory.temp_size_in_bytes
        fields["kernels"] = [_kernel_record(kernel) for kernel in result.report.kernels]
    return json.dumps(fields)


def _kernel_record(kernel: aot.Kernel) -> dict[str, Any]:
    loops = [
        {
            "round": name,
            "instructions": dict(cost.counts.most_common()),
            "cycles": {n: getattr(cost, n) for n in ("tensor", "shared", "issue", "special", "fma", "alu")},
            "bound": cost.bound(kernel.warpgroups - 1),
        }
        for name, cost in inner_loops(kernel)
    ]
    names = ("name", "grid", "threads", "warpgroups", "registers", "stack", "spill_stores", "spill_loads")
    names += ("shared_memory", "hgmma", "tma_loads", "tma_stores", "notes")
    limits = {"register_limits": kernel.sass.register_limits, "tile": tile(kernel)}
    return {name: getattr(kernel, name) for name in names} | limits | {"inner_loops": loops}
