"""Measures which tile sizes are the fastest on this Hopper GPU, and writes them as the table that the kernels read.

    python benchmarks/tune.py FILE [--kernels flash_forward,flash_backward,flash_backward_packed,paged_decode]

FILE is pallas_kernels/tuned/GPU.json for one that is to ship. For each kernel and head dim, every candidate is timed on
a few problems, beside all others in turns; the one with the least geometric mean of times wins. Each time is printed
when it is known. Candidates that do not compile are named and left out; tables of kernels that are not measured stay as
FILE has them.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from measure import ON_GPU, compile_all, seconds
from paged_attention import CHAINED, Problem, chained

from pallas_kernels import flash_attention_mosaic, flash_attention_mosaic_backward, paged_attention_mosaic
from pallas_kernels.attention_spec import AttentionOperands, AttentionSpec
from pallas_kernels.devices import lacks_mosaic
from pallas_kernels.flash_backward_config import default_config, fused_config
from pallas_kernels.flash_forward_config import ForwardConfig
from pallas_kernels.paged_decode_config import fitting_config

Row = dict[str, int]
Programs = dict[Any, tuple[Callable, tuple]]


def candidates(**values: Iterable[int]) -> list[Row]:
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def fastest(rows: list[Row], times: dict[tuple[int, Any], float]) -> Row:
    """The row of the least geometric mean of the times, given by its number and a problem, among those with all."""
    problems = {problem for _, problem in times}
    complete = [i for i in range(len(rows)) if all((i, problem) in times for problem in problems)]
    return rows[min(complete, key=lambda i: sum(math.log(times[i, problem]) for problem in problems))]


def measure(rows: list[Row], problems: dict[Any, tuple[Callable, Callable]]) -> Row:
    """problems: by name, what makes the arguments, and what makes a row's function of them."""
    times: dict[tuple[int, Any], float] = {}
    for name, (make, function_of) in problems.items():
        arguments = jax.eval_shape(make)
        compiled = compile_all({i: (function_of(row), arguments) for i, row in enumerate(rows)})
        made = jax.jit(make)()
        found = seconds({i: partial(program, *made) for i, program in compiled.items()})
        for i, time in sorted(found.items(), key=lambda item: item[1]):
            print(f"{name}: {time * 1e6:.1f} us, {rows[i]}", flush=True)
            times[i, name] = time
    return fastest(rows, times)


def attention_problems(head_dim: int) -> Iterator[tuple[str, tuple[int, ...], AttentionSpec]]:
    """Their names, shapes and masks."""
    for length, causal in itertools.product((4096, 16384), (False, True)):
        shape = 16384 // length, length, 2048 // head_dim, head_dim
        spec = AttentionSpec(head_dim**-0.5, upper=0 if causal else None)
        yield f"head dim {head_dim}, length {length}, causal {causal}", shape, spec


def arrays(shape: tuple[int, ...], count: int) -> tuple[jax.Array, ...]:
    return tuple(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(count))


def flash_forward(head_dim: int) -> Row:
    rows = candidates(keys=(64, 128), warpgroups=(2, 3), stages=(2, 3))
    problems = {}
    for name, shape, spec in attention_problems(head_dim):

        def function_of(row: Row, spec: AttentionSpec = spec) -> Callable:
            config = ForwardConfig(**row)
            return lambda q, k, v: flash_attention_mosaic.forward(q, k, v, AttentionOperands(), spec, config)

        problems[f"flash_forward, {name}"] = partial(arrays, shape, 3), function_of
    return measure(rows, problems)


def flash_backward(head_dim: int, *, packed: bool = False) -> Row:
    """packed: of documents of 1,000 tokens."""
    rows = candidates(heads=(1, 2, 4, 8, 16, 32))
    problems = {}
    for name, shape, spec in attention_problems(head_dim):

        def make(shape: tuple[int, ...] = shape) -> tuple[jax.Array, ...]:
            B, T, N, _ = shape
            segments = jnp.arange(B * T, dtype=jnp.int32).reshape(B, T) // 1000
            return *arrays(shape, 4), jnp.full((B, N, T), math.log(T)), jnp.zeros((B, N, T)), segments

        def function_of(row: Row, spec: AttentionSpec = spec) -> Callable:
            def gradients(q, k, v, dout, lse, delta, segments):
                ids = segments if packed else None
                operands = AttentionOperands(query_segments=ids, key_segments=ids)
                ((_, tiles),) = default_config(head_dim, operands, spec).launches
                backward = flash_attention_mosaic_backward.backward
                return backward(q, k, v, operands, spec, lse, delta, dout, fused_config(tiles, spec, **row))[:3]

            return gradients

        problems[f"flash_backward{', packed' * packed}, {name}"] = make, function_of
    return measure(rows, problems)


def paged_decode(head_dim: int) -> Row:
    rows = candidates(width=(128, 256), whole=(0, 1024), chunk=(256, 512), items=(128,), blocks=(132, 264))
    problems = {}
    for B, length, K in ((64, 1024, 4), (64, 640, 8), (64, 8192, 8), (16, 8192, 4), (1, 8192, 8)):
        problem = Problem(B, 1, length, K=K, H=head_dim)
        options = paged_attention_mosaic.Options(head_dim**-0.5, None, None)

        def function_of(row: Row, K: int = K, options: Any = options) -> Callable:
            config = fitting_config(K, 32 // K, head_dim, **row)

            def attend(query, cache, batch):
                return paged_attention_mosaic.decode(query, cache, batch, batch.block_tables, options, config)

            return chained(attend)

        name = f"paged_decode, head dim {head_dim}, {B} x {length}, kv heads {K}, {CHAINED} calls"
        problems[name] = problem.arguments, function_of
    return measure(rows, problems)


# Each with the head dims that are measured, and up to which one each of them serves.
KERNELS: dict[str, tuple[Callable[[int], Row], dict[int, int]]] = {
    "flash_forward": (flash_forward, {64: 64, 128: 128, 256: 256}),
    "flash_backward": (flash_backward, {64: 64, 128: 128}),
    "flash_backward_packed": (partial(flash_backward, packed=True), {64: 64, 128: 128}),
    "paged_decode": (paged_decode, {64: 64, 128: 256}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--kernels", default=",".join(KERNELS))
    arguments = parser.parse_args()
    names = arguments.kernels.split(",")
    if unknown := set(names) - KERNELS.keys():
        parser.error(f"--kernels: expected some of {', '.join(KERNELS)}, got {', '.join(sorted(unknown))}")
    if not ON_GPU or lacks_mosaic():
        raise SystemExit(f"expected a Hopper GPU to measure, got {jax.devices()[0].device_kind}")
    content = json.loads(arguments.file.read_text()) if arguments.file.exists() else {}
    content |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for name in names:
        measured, head_dims = KERNELS[name]
        content[name] = [{"head_dim": upto, **measured(head_dim)} for head_dim, upto in head_dims.items()]
        arguments.file.write_text(written(content))


def written(content: dict[str, Any]) -> str:
    """As JSON, a line a row."""
    fields = []
    for name, value in content.items():
        rows = ",\n  ".join(json.dumps(row) for row in value) if isinstance(value, list) else None
        fields.append(f' "{name}": ' + (json.dumps(value) if rows is None else f"[\n  {rows}\n ]"))
    return "{\n" + ",\n".join(fields) + "\n}\n"


if __name__ == "__main__":
    main()
