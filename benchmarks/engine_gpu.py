"""The engine on a GPU, with random weights: tokens/s against the bandwidth floor, and the host's share of a step.

    python benchmarks/engine_gpu.py [--models 1b,8b] [--batch 64] [--prompt 512] [--new 256] [--json FILE]
                                    [--peer] [--peer-new 64] [--peer-python PATH/TO/python]

Shapes are Llama-3.2-1B's and Llama-3-8B's, in bfloat16; every request has a prompt of so many random tokens and brings
so many new ones. The floor of a decode step is the time that its bytes, all weights and the keys and values held, take
at the bandwidth that a copy reaches in the same run. The rate of decoding is that of the steps in which all requests
decode; the rate of the whole run has the prefills in it too. The peer, transformers' continuous batching, then runs in
a process of its own, under this Python or the one that is named, on the same prompts and --peer-new tokens each.
On a CPU a tiny model shows that it works.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measure import DTYPE, ON_GPU, Figures, copy_bandwidth

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


def engine_of(name: str, batch: int, limit: int) -> LLMEngine:
    """With room for so many requests of so many tokens."""
    config = CONFIGS[name]
    # Weight by weight: with one program that draws all of them an 8B engine took 97 s to make on an H200.
    model = Llama(config, rngs=nnx.Rngs(0), dtype=DTYPE)
    return LLMEngine(
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


def floor_seconds(name: str, batch: int, context: float, bandwidth: float) -> float:
    """Of a decode step."""
    config, itemsize = CONFIGS[name], jnp.dtype(DTYPE).itemsize
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=DTYPE))
    weights = sum(x.size for x in jax.tree.leaves(model)) * itemsize
    if not config.tie_embeddings:
        weights -= config.vocab_size * config.d_model * itemsize  # a step reads few rows of the embedding
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    return (weights + batch * context * token) / bandwidth


def measure(engine: LLMEngine, name: str, prompts: list[list[int]], new: int, floor: float) -> dict[str, Any]:
    batch, steps = len(prompts), list[float]()
    seconds = run(engine, prompts, new, lambda seconds, tokens: steps.append(seconds) if tokens == batch else None)
    if not steps:
        raise SystemExit(f"--new: expected more than {new}, so that all {batch} requests decode at once after prefills")
    step = median(steps)
    return {
        "model": name,
        "batch": batch,
        "prompt": len(prompts[0]),
        "new": new,
        "tokens/s": batch * new / seconds,
        "decoding tokens/s": batch / step,
        "step ms": step * 1e3,
        "floor ms": floor * 1e3,
        "share of floor": floor / step,
    }


def host_seconds(engine: LLMEngine, prompts: list[list[int]], new: int) -> float:
    """The host's own work of a step: scheduling, laying out, dispatching and taking in, with a device that is done."""
    times: list[float] = []
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add_request(f"host-{number}", prompt, params)
    while engine.has_unfinished():
        time.sleep(0.02)  # the step under way ends meanwhile
        start, tokens = time.perf_counter(), engine.stats().generation_tokens
        engine.step(only_finished=True)
        if engine.stats().generation_tokens - tokens == len(prompts):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="1b,8b" if ON_GPU else "tiny", help=f"of {', '.join(CONFIGS)}")
    parser.add_argument("--batch", type=int, default=64 if ON_GPU else 4)
    parser.add_argument("--prompt", type=int, default=512 if ON_GPU else 32)
    parser.add_argument("--new", type=int, default=256 if ON_GPU else 16)
    parser.add_argument("--peer", action="store_true", help="measure transformers' continuous batching too")
    parser.add_argument("--peer-new", type=int, default=64)
    parser.add_argument("--peer-python", default=sys.executable, help="a Python with transformers, if not this one")
    parser.add_argument("--json", type=Path, help="save all figures there")
    arguments = parser.parse_args()
    names = arguments.models.split(",")
    if unknown := set(names) - CONFIGS.keys():
        parser.error(f"--models: expected some of {', '.join(CONFIGS)}, got {', '.join(sorted(unknown))}")
    batch, prompt, new = arguments.batch, arguments.prompt, arguments.new
    figures = Figures(arguments.json)
    bandwidth = copy_bandwidth()
    for name in names:
        engine = engine_of(name, batch, prompt + new + 16)
        prompts = prompts_of(CONFIGS[name], batch, prompt)
        floor = floor_seconds(name, batch, prompt + new / 2, bandwidth)
        start = time.perf_counter()
        run(engine, prompts, new, lambda seconds, tokens: None)
        row = {"compiling and first run s": time.perf_counter() - start}
        figures.add("engine", measure(engine, name, prompts, new, floor) | row)
        figures.add("host", {"model": name, "batch": batch, "step ms": host_seconds(engine, prompts, new) * 1e3})
        if arguments.peer:
            ours = batch * arguments.peer_new / run(engine, prompts, arguments.peer_new, lambda seconds, tokens: None)
            del engine
            peer = peer_rate(arguments.peer_python, name, batch, prompt, arguments.peer_new)
            sizes = {"model": name, "batch": batch, "prompt": prompt, "new": arguments.peer_new}
            figures.add("peer", sizes | {"tokens/s": ours, "peer tokens/s": peer, "times as fast": ours / peer})


if __name__ == "__main__":
    main()
