"""Compiling ahead of time, for a named GPU on a machine without one, and what came out of it.

The CUDA plugin compiles for a card that is described to it; nothing runs. Needs the extra `aot` (on a machine with a
card, `cuda12` and the package nvidia-cuda-nvdisasm), and a process that started with JAX_PLATFORMS=cpu: else JAX looks
for a card first and gives the plugin up.

    from pallas_kernels import aot, flash_attention          # JAX_PLATFORMS=cpu python script.py
    q = jax.ShapeDtypeStruct((1, 4096, 32, 128), jnp.bfloat16)
    report = aot.compile(lambda q: flash_attention(q, q, q, is_causal=True), q, gpu="h100")
    print(report)                                            # a line a kernel: registers, spills, shared memory, ...
    assert not report.faults()

Every kernel written in Pallas for Mosaic GPU is reported as the plugin's own compiler saw it; kernels that XLA makes
are not.
"""

import importlib.util
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from .gpu import GPUS, Gpu
from .sass import TMA_LOADS, TMA_STORES, Sass

# ptxas: setmaxnreg ignored (C7504), wgmma serialized (C7510 and on). Only this one says that nothing was lost.
HARMLESS_NOTES = ("C7519",)  # a fence was put in before wgmma that takes registers


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled. Bytes, and registers of a thread.

    shared_memory is what a block asks for at launch; registers what the code names at most, in whichever warpgroup.
    """

    name: str
    grid: tuple[int, int, int]
    threads: int
    shared_memory: int
    stack: int
    spill_stores: int
    spill_loads: int
    notes: tuple[str, ...]
    sass: Sass = field(repr=False)

    @property
    def registers(self) -> int:
        return self.sass.registers

    @property
    def warpgroups(self) -> int:
        return self.threads // 128

    @property
    def hgmma(self) -> int:
        return self.sass.count("HGMMA")

    @property
    def tma_loads(self) -> int:
        return self.sass.count(*TMA_LOADS)

    @property
    def tma_stores(self) -> int:
        return self.sass.count(*TMA_STORES)

    def faults(self, pending: int = 0) -> list[str]:
        """What makes the kernel slow or wrong, a line each: spills, ptxas' notes, and the order of its waits.

        pending: as `Sass.findings` takes it.
        """
        spills = [f"{self.spill_stores} bytes of spill stores, {self.spill_loads} of loads"] * bool(
            self.spill_stores or self.spill_loads
        )
        notes = [note for note in self.notes if not any(harmless in note for harmless in HARMLESS_NOTES)]
        return [f"{self.name}: {fault}" for fault in (*spills, *notes, *self.sass.findings(pending))]

    def __str__(self) -> str:
        limits = "/".join(map(str, self.sass.register_limits)) or "launch"
        return (
            f"{self.name}: {self.registers} registers (limits {limits}), {self.stack} B stack, {self.spill_stores} B "
            f"spill stores, {self.spill_loads} B spill loads, {self.shared_memory} B shared memory, {self.warpgroups} "
            f"warpgroups, {self.hgmma} HGMMA, {self.tma_loads} TMA loads, {self.tma_stores} TMA stores"
        )


@dataclass(frozen=True)
class Report:
    """A compiled program.

    kernels: each once, in the program's order. text: what XLA made of the program, its optimized HLO. memory: of one
    device, in bytes (argument_size_in_bytes, alias_size_in_bytes, temp_size_in_bytes and others).
    """

    gpu: Gpu
    kernels: tuple[Kernel, ...]
    text: str = field(repr=False)
    memory: Any

    def faults(self, pending: Mapping[str, int] = MappingProxyType({})) -> list[str]:
        """Those of all kernels. pending: as `Sass.findings` takes it, of the kernels of these names."""
        return [fault for kernel in self.kernels for fault in kernel.faults(pending.get(kernel.name, 0))]

    def operations(self, opcode: str) -> list[str]:
        """The result type of each HLO operation such as "copy" or "all-reduce", as in "bf16[2,32]{1,0}".

        One started and finished in two steps counts once; one in the body of a loop also once.
        """
        pattern = rf"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) {re.escape(opcode)}(?:-start)?\("
        return re.findall(pattern, self.text, re.MULTILINE)

    def copies(self, shape: tuple[int, ...]) -> int:
        """How many copies the program makes of arrays of this shape."""
        dimensions = f"[{','.join(map(str, shape))}]"
        return sum(dimensions in result for result in self.operations("copy"))

    def collectives(self) -> Counter[str]:
        """How many operations of each kind talk to other devices."""
        kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
        return Counter({kind: count for kind in kinds if (count := len(self.operations(kind)))})

    def __str__(self) -> str:
        faults = self.faults()
        lines = [*map(str, self.kernels), *(f"FAULT {fault}" for fault in faults), f"memory: {self.memory}"]
        return "\n".join(lines)


def mesh(
    gpu: str = "h100", shape: tuple[int, ...] = (1,), axis_names: tuple[str, ...] = ("device",)
) -> jax.sharding.Mesh:
    """A mesh of GPUs that are not there, for `compile`.

    Raises ValueError for an unknown GPU; RuntimeError where the CUDA plugin is missing or was given up by JAX.

    >>> mesh("h100", (8,), ("tensor",)).size
    8
    """
    target = _named(gpu)
    # The plugin would look for all of CUDA's libraries, of which the compiler needs none. Read when it is loaded.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=gpu,
            topology=f"1x{math.prod(shape)}x1",
            target_config=target.target_config,
        )
    except NotImplementedError:
        raise RuntimeError(
            "no CUDA plugin to compile with: expected the extra `aot` (pip install 'jpaged[aot]'), and "
            "JAX_PLATFORMS=cpu in the environment when the process starts"
        ) from None
    return jax.sharding.Mesh(np.array(topology.devices).reshape(shape), axis_names)


def compile(function: Any, *args: Any, gpu: str = "h100", devices: jax.sharding.Mesh | None = None) -> Report:
    """Compiles function(*args) for a GPU.

    Args:
      function: jitted or not; jit it yourself to donate arguments.
      args: pytrees of `jax.ShapeDtypeStruct` (or arrays, of which only shapes count). On several devices, give them
        shardings over `devices`; those without one are held whole by each device.
      gpu: "h100", "h200" or "b200".
      devices: several of them, made by `mesh`; in force (`jax.set_mesh`) while the function is traced.

    Raises ValueError where `devices` are not that GPU, what `mesh` raises, and what tracing and compiling raise.
    """
    devices = mesh(gpu) if devices is None else devices
    expected, kind = _named(gpu).device_kind, devices.devices.flat[0].device_kind
    if kind != expected:
        raise ValueError(f"devices: expected {expected}, got {kind}")
    replicated = jax.sharding.NamedSharding(devices, jax.P())

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        sharding = x.sharding if isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None else replicated
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    function = function if hasattr(function, "trace") else jax.jit(function)
    args = jax.tree.map(placed, args)
    with jax.set_mesh(devices):
        lowered = function.trace(*args).lower(lowering_platforms=("cuda",))
    with _uncached(), _dumped() as folder:
        compiled = lowered.compile()
        text = compiled.as_text()
        dumped = [_read_kernel(folder, path.stem) for path in sorted(folder.glob("*.ptxas"), key=_number)]
    hashes = dict.fromkeys(re.findall(r'kernel_hash = "((?:[^"\\]|\\.)*)"', text))
    new = [name for name in hashes if name not in _COMPILED]
    if len(dumped) != len(new):
        raise RuntimeError(
            f"expected to read of {len(new)} kernels compiled, found {[kernel.name for kernel in dumped]}"
        )
    _COMPILED.update(zip(new, dumped, strict=True))
    kernels = tuple(_COMPILED[name] for name in hashes)
    return Report(GPUS[gpu], kernels, text, compiled.memory_analysis())


def _named(gpu: str) -> Gpu:
    if gpu not in GPUS:
        raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, got {gpu!r}")
    return GPUS[gpu]


# By the hash that names a kernel in a program: from jax 0.12 on, the compiler does not compile one again.
_COMPILED: dict[str, Kernel] = {}


def _number(path: Path) -> int:
    """Of a dump, counted in the order of compilation."""
    return int(path.stem.rpartition("_")[2])


@contextmanager
def _uncached() -> Iterator[None]:
    """Leaves JAX's cache on disk alone: a program from there says nothing of its kernels, and cannot be loaded."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # which asks the setting once and remembers
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


@contextmanager
def _dumped() -> Iterator[Path]:
    """A folder into which Mosaic GPU writes what its compiler says of each kernel, and the machine code.

    For that it runs `nvdisasm` on a file of its own and leaves that behind in /tmp; ours takes it away.
    """
    from jax.experimental.mosaic.gpu import core  # noqa: F401  # sets MOSAIC_GPU_CUDA_ROOT when first imported

    with tempfile.TemporaryDirectory(prefix="jpaged-aot-") as name:
        folder = Path(name)
        tool = folder / "cuda" / "bin" / "nvdisasm"
        tool.parent.mkdir(parents=True)
        tool.write_text(
            f'#!/bin/sh\n"{_nvdisasm()}" "$@"\nstatus=$?\n'
            'for argument; do case "$argument" in /tmp/mosaic-gpu-*) rm -r "${argument%/*}";; esac; done\n'
            "exit $status\n"
        )
        tool.chmod(0o700)
        variables = {"MOSAIC_GPU_CUDA_ROOT": str(folder / "cuda"), "MOSAIC_GPU_DUMP_TO": name}
        before = {variable: os.environ.get(variable) for variable in variables}
        os.environ.update(variables)
        try:
            yield folder
        finally:
            for variable, value in before.items():
                if value is None:
                    del os.environ[variable]
                else:
                    os.environ[variable] = value


def _nvdisasm() -> str:
    """The disassembler: of the package nvidia-cuda-nvdisasm, or of an installed CUDA."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for tool in sorted(Path(folder).glob("*/bin/nvdisasm")):
            return str(tool)
    tool = shutil.which("nvdisasm") or shutil.which("/usr/local/cuda/bin/nvdisasm")
    if tool is None:
        raise RuntimeError("no nvdisasm: expected the extra `aot` (pip install 'jpaged[aot]')")
    return tool


def _read_kernel(folder: Path, module: str) -> Kernel:
    """What the dumps of a module say."""
    log = _dump(folder, module, "ptxas")
    passes = _dump(folder, module, "mlir-passes.log")
    spills = _search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    stack, spill_stores, spill_loads = map(int, spills)
    notes = tuple(line.partition(":")[2].strip() for line in log.splitlines() if re.search(r"\(C\d+\)", line))
    # The last form of the host's code. What it calls, by jax 0.11 or 0.12, takes stream, grid, cluster, block, bytes of
    # shared memory, and more.
    host = passes[passes.rfind("IR Dump") :]
    constants = dict(re.findall(r"(%\w+) = llvm\.mlir\.constant\((\d+) : i(?:32|64)\)", host))
    launch = _search(r"llvm\.call @mosaic_gpu_(?:launch_kernel|build_kernel_spec)\(([^)]*)\)", host)[0].split(", ")
    numbers = [_constant(value, host, constants) for value in launch[1:11]]
    return Kernel(
        name=re.sub(r"_\d+$", "", module),
        grid=(numbers[0], numbers[1], numbers[2]),
        threads=math.prod(numbers[6:9]),
        shared_memory=numbers[9],
        stack=stack,
        spill_stores=spill_stores,
        spill_loads=spill_loads,
        notes=notes,
        sass=Sass(_dump(folder, module, "sass_ctrl")),
    )


def _constant(value: str, host: str, constants: dict[str, str]) -> int:
    """A number in the host's code, through casts."""
    while value not in constants:
        value = _search(rf"{re.escape(value)} = llvm\.(?:trunc|sext|zext) (%\w+) ", host)[0]
    return int(constants[value])


def _dump(folder: Path, module: str, kind: str) -> str:
    path = folder / f"{module}.{kind}"
    if not path.exists():
        raise RuntimeError(
            f"expected Mosaic GPU to write {path.name}, found {sorted(p.name for p in folder.iterdir())}"
        )
    return path.read_text()


def _search(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"expected {pattern!r} in what Mosaic GPU wrote, got {text[-2000:]}")
    return match.groups()
