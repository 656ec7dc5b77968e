"""Paged decode compiled for a GPU that is not there, beside jax's deprecated Pallas-Triton kernel for the same.

    JAX_PLATFORMS=cpu python benchmarks/paged_attention_peer.py [--gpu h100] [--json FILE]

bf16, 32 query heads of 128 over 8 kv heads, blocks of 16, every sequence as long as its table. Printed are each launch
of one call, and of the whole: how many there are, and how many more where a second layer follows (what depends on the
tables alone is done once); the most shared memory of a block; the bytes read and written if each array of each launch
passes once, as pages do, for no two blocks of either kernel read the same; and what lies in memory between launches.

No compiler says how long it takes, nor does XLA tell the Triton kernel's registers and spills. Needs the extra `aot`.
"""

import argparse
import json
import math
import os
import re
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from pallas_kernels import KVCache, PagedBatch, aot, paged_attention

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as triton

N, K, H, BLOCK_SIZE = 32, 8, 128, 16
SIZES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}


def struct(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def ours(layers, query, keys, values, tables, lengths):
    starts = jnp.arange(len(lengths) + 1, dtype=jnp.int32)
    batch = PagedBatch(tables, lengths, starts, starts[1:], starts[-1], max_query_len=1)
    for layer in range(layers):
        query = paged_attention(query, KVCache(keys, values), batch, layer, implementation="mosaic")
    return query


def theirs(layers, query, keys, values, tables, lengths):
    for _ in range(layers):
        query = triton(query, keys, values, tables, lengths)
    return query


def bytes_of(types: str) -> int:
    """Of the arrays in an HLO type."""
    return sum(
        SIZES[kind] * math.prod(int(size) for size in shape.split(",") if size)
        for kind, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", types)
    )


def traffic(text: str, pages: jax.ShapeDtypeStruct) -> int:
    """Bytes of the operands and results of all launches of a compiled program; of pages of several layers, of one."""
    entry = text[text.index("\nENTRY ") :]
    lines = re.findall(r"^\s+(?:ROOT )?%([\w.-]+) = (.*?) ([\w-]+)\((.*?)\)", entry, re.MULTILINE)
    sizes = {name: bytes_of(result) for name, result, _, _ in lines}
    whole = math.prod(pages.shape) * 2
    read = whole // pages.shape[0] if len(pages.shape) == 5 else whole
    free = ("parameter", "bitcast", "get-tuple-element", "tuple", "constant")
    arrays = [
        size
        for name, _, opcode, operands in lines
        if opcode not in free
        for size in (sizes[name], *(sizes[operand] for operand in re.findall(r"%([\w.-]+)", operands)))
    ]
    return sum(read if size == whole else size for size in arrays)


class Compiler:
    """Compiles for a GPU, and reads what XLA writes into `folder` of its launches."""

    def __init__(self, gpu: str, folder: Path):
        self.gpu, self.folder = gpu, folder

    def compile(self, function: Any, *arguments: Any) -> tuple[aot.Report, list[str]]:
        """The report, and a line a launch."""
        seen = set(self.folder.iterdir())
        report = aot.compile(function, *arguments, gpu=self.gpu)
        new = set(self.folder.glob("*.thunk_sequence.txt")) - seen
        if len(new) != 1:
            raise RuntimeError(f"expected XLA to write one list of launches, found {sorted(path.name for path in new)}")
        return report, [line.strip() for line in new.pop().read_text().splitlines() if re.search(r"kCustom", line)]


def measure(compiler: Compiler, B: int, length: int) -> list[dict[str, Any]]:
    blocks = B * length // BLOCK_SIZE
    query = struct(B, N, H)
    tables, lengths = struct(B, length // BLOCK_SIZE, dtype=jnp.int32), struct(B, dtype=jnp.int32)
    rows = []
    for name, function, pages in (
        ("jpaged", ours, struct(2, blocks, BLOCK_SIZE, K, H)),
        ("Pallas-Triton", theirs, struct(K, blocks, BLOCK_SIZE, H)),
    ):
        arguments = query, pages, pages, tables, lengths
        report, lines = compiler.compile(partial(function, 1), *arguments)
        _, two = compiler.compile(partial(function, 2), *arguments)
        print(f"{name}, {B} x {length}", *lines, sep="\n    ")
        shared = [int(size) for line in lines for size in re.findall(r"shared_memory: (\d+)", line)]
        moved = traffic(report.text, pages)
        rows.append(
            {
                "sequences": B,
                "length": length,
                "kernel": name,
                "launches": len(lines),
                "more a layer": len(two) - len(lines),
                "shared memory": max([*shared, *(kernel.shared_memory for kernel in report.kernels)]),
                "MB moved": moved / 1e6,
                "of the cache's": moved / (2 * 2 * K * H * B * length),
                "MB between": report.memory.temp_size_in_bytes / 1e6,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jpaged-peer-") as folder:
        # Read when JAX first looks for devices.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder}"
        compiler = Compiler(arguments.gpu, Path(folder))
        rows = [row for shape in ((64, 8192), (64, 1024), (1, 65536)) for row in measure(compiler, *shape)]
    table = Table(*rows[0], title=f"paged decode, compiled for {arguments.gpu}")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=110).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"gpu": arguments.gpu, "jax": jax.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
