"""The engine on a GPU, with random weights: tokens/s against the bandwidth floor, and the host's share of a step.

    python benchmarks/engine_gpu.py [--models 1b,8b] [--batch 64] [--prompt 512] [--new 256]
                                    [--peer-python PATH/TO/python] [--json FILE]

Shapes are Llama-3.2-1B's and Llama-3-8B's, in bfloat16; every request has a prompt of so many random tokens and brings
so many new ones. The floor of a decode step is the time that its bytes, all weights and the keys and values held, take
at the bandwidth that a copy reaches in the same run. The rate of decoding is that of the steps in which all requests
decode; the rate of the whole run has the prefills in it too. The peer, transformers' continuous batching, runs in a
process of its own under a Python that has it, on the same prompts and as many new tokens.
On a CPU a tiny model shows that it works.
"""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs the card's memory first

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from jpaged import EngineConfig, LLMEngine, SamplingParams
from models import Llama, LlamaConfig

LLAMA_3 = partial(LlamaConfig, vocab_size=128_256, num_heads=32, num_kv_heads=8, max_len=8192, rope_theta=500_000.0)
CONFIGS = {
    "1b": LLAMA_3(d_model=2048, num_layers=16, head_dim=64, d_ff=8192, tie_embeddings=True),
    "8b": LLAMA_3(d_model=4096, num_layers=32, head_dim=128, d_ff=14_336),
    "tiny": LlamaConfig(
        vocab_size=512, d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=128, max_len=1024
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """Of one run; rates in tokens/s, times in milliseconds."""

    model: str
    batch: int
    prompt: int
    new: int
    total_rate: float
    decode_rate: float
    decode_step_ms: float
    floor_step_ms: float
    host_ms: float  # of a step, in which the host schedules, starts the next one and takes in what was sampled
    peer_rate: float | None = None

    @property
    def of_floor(self) -> float:
        return self.floor_step_ms / self.decode_step_ms


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy far larger than the caches."""
    x = jnp.ones(2**29 if jax.default_backend() == "gpu" else 2**22, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    copy(x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        results = [copy(x) for _ in range(4)]
        results[-1].block_until_ready()
        times.append((time.perf_counter() - start) / 4)
    return 2 * x.nbytes / median(times)


def prompts_of(config: LlamaConfig, batch: int, length: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, length)).tolist()


def run(engine: LLMEngine, prompts: list[list[int]], new: int, note: Callable[[float, int], None]) -> float:
    """Seconds of all requests; note(seconds, tokens) is told of each step."""
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    start = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{start}-{number}", prompt, params)
    while engine.has_unfinished():
        before, tokens = time.perf_counter(), engine.stats().generation_tokens
        for output in engine.step(only_finished=True):
            if output.error is not None:
                raise RuntimeError(output.error)
        note(time.perf_counter() - before, engine.stats().generation_tokens - tokens)
    return time.perf_counter() - start


def measure(name: str, batch: int, prompt: int, new: int, bandwidth: float) -> Figures:
    config = CONFIGS[name]
    on_gpu = jax.default_backend() == "gpu"
    dtype = jnp.bfloat16 if on_gpu else jnp.float32
    model = nnx.jit(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype))()
    limit = prompt + new + 16
    engine = LLMEngine(
        model,
        None,
        EngineConfig(
            max_num_seqs=batch,
            max_num_batched_tokens=max(4096, batch),
            max_model_len=min(limit, config.max_len),
            num_blocks=batch * -(-limit // 16) + 16,
            enable_prefix_caching=False,
        ),
    )
    prompts = prompts_of(config, batch, prompt)
    run(engine, prompts, new, lambda seconds, tokens: None)  # compiles
    steps: list[float] = []
    seconds = run(engine, prompts, new, lambda seconds, tokens: steps.append(seconds) if tokens == batch else None)
    step = median(steps)

    itemsize = jnp.dtype(dtype).itemsize
    weights = sum(x.size for x in jax.tree.leaves(model)) * itemsize
    if not config.tie_embeddings:
        weights -= config.vocab_size * config.d_model * itemsize  # a step reads few rows of the embedding
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    floor = (weights + batch * (prompt + new / 2) * token) / bandwidth
    return Figures(
        name,
        batch,
        prompt,
        new,
        batch * new / seconds,
        batch / step,
        step * 1e3,
        floor * 1e3,
        host_seconds(engine) * 1e3,
    )


def host_seconds(engine: LLMEngine) -> float:
    """The host's own work of a step: scheduling, laying out, dispatching and taking in, with a device that is done."""
    prompts = [[1] * 8] * engine.config.max_num_seqs
    times: list[float] = []
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add_request(f"host-{number}", prompt, params)
    while engine.has_unfinished():
        time.sleep(0.02)  # the step under way ends meanwhile
        start = time.perf_counter()
        engine.step(only_finished=True)
        times.append(time.perf_counter() - start)
    return median(times)


def peer_rate(python: str, name: str, batch: int, prompt: int, new: int) -> float:
    """Tokens/s of transformers' continuous batching."""
    config = CONFIGS[name]
    script = Path(__file__).with_name("transformers_continuous_peer.py")
    given = {
        "config": {
            "vocab_size": config.vocab_size, "hidden_size": config.d_model, "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim, "intermediate_size": config.d_ff, "max_position_embeddings": config.max_len,
            "tie_word_embeddings": config.tie_embeddings,
        },
        "prompts": prompts_of(config, batch, prompt),
        "new": new,
    }  # fmt: skip
    result = subprocess.run([python, str(script)], input=json.dumps(given), capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{script.name} failed:\n{result.stderr[-3000:]}")
    return float(json.loads(result.stdout.splitlines()[-1])["tokens_per_second"])


def show(figures: list[Figures]) -> None:
    table = Table(
        "model", "batch", "prompt", "new", "tokens/s", "decoding", "step ms", "floor ms", "of floor", "host ms", "peer"
    )
    for f in figures:
        peer = "" if f.peer_rate is None else f"{f.peer_rate:,.0f} ({f.total_rate / f.peer_rate:.1f}x)"
        table.add_row(
            f.model, str(f.batch), str(f.prompt), str(f.new), f"{f.total_rate:,.0f}", f"{f.decode_rate:,.0f}",
            f"{f.decode_step_ms:.2f}", f"{f.floor_step_ms:.2f}", f"{f.of_floor:.0%}", f"{f.host_ms:.2f}", peer,
        )  # fmt: skip
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = jax.default_backend() == "gpu"
    parser.add_argument("--models", default="1b,8b" if on_gpu else "tiny", help=f"of {', '.join(CONFIGS)}")
    parser.add_argument("--batch", type=int, default=64 if on_gpu else 4)
    parser.add_argument("--prompt", type=int, default=512 if on_gpu else 32)
    parser.add_argument("--new", type=int, default=256 if on_gpu else 16)
    parser.add_argument("--peer-python", help="a Python with transformers, to measure its continuous batching too")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    names = arguments.models.split(",")
    if unknown := set(names) - CONFIGS.keys():
        parser.error(f"--models: expected some of {', '.join(CONFIGS)}, got {', '.join(sorted(unknown))}")
    sizes = arguments.batch, arguments.prompt, arguments.new
    peers = {name: peer_rate(arguments.peer_python, name, *sizes) for name in names if arguments.peer_python}
    bandwidth = copy_bandwidth()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, a copy moves {bandwidth / 1e9:,.0f} GB/s")
    figures = []
    for name in names:
        figures.append(replace(measure(name, *sizes, bandwidth), peer_rate=peers.get(name)))
        show(figures[-1:])
    if arguments.json:
        content: dict[str, Any] = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "bandwidth": bandwidth,
        }
        arguments.json.write_text(json.dumps(content | {"figures": [asdict(f) for f in figures]}, indent=1))


if __name__ == "__main__":
    main()
