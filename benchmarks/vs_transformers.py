"""jpaged beside Hugging Face transformers on the CPU: same weights, float32, same prompts, same run.

    python benchmarks/vs_transformers.py --model smollm2-135m --peer-python PATH/TO/python

PATH/TO/python has torch, transformers and gguf, and llama-cpp-python if llama.cpp is to be measured too. Peers run
in processes of their own and wait while others work: all take turns, after a warm-up of each. Every repeat's prompts
begin one token later than the repeat's before, so that no cache of prefixes helps.
"""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

TEXT = """\
The lighthouse stood at the end of a long stone pier, and for two hundred years somebody had climbed its stairs
every evening to light the lamp. When the last keeper retired, the town council met to decide what should be done.
Some wanted to sell it to a hotel from the capital; others said that a harbour without a light was only a beach.
In the end a retired engineer named Ada offered to look after it for nothing, provided that she was allowed to
rebuild the clockwork that had once turned the lens. It took her three winters. She cast new gears from old drawings,
ground the bearings by hand, and wrote down every measurement in a blue notebook. On the first night that the beam
swept over the bay again, fishermen from four villages came out in their boats to watch. "It keeps time to within a
second a day," she told the children who followed her up the stairs, "and do you know why? Because each wheel only
has to do one small thing well." Years later the notebook was found to contain 412 pages, 96 diagrams, a recipe for
fish soup, and one sentence underlined twice: measure first, then cut.
"""
NUM_PROMPTS, SHORTEST, LONGEST = 16, 8, 120


@dataclass(frozen=True)
class Workload:
    """Prompts answered together; `spans` are their places in the text's tokens."""

    name: str
    spans: tuple[tuple[int, int], ...]  # start, length
    max_tokens: int

    def prompts(self, tokens: list[int], repeat: int) -> list[list[int]]:
        around = tokens + tokens
        return [around[start + repeat : start + repeat + length] for start, length in self.spans]


def workloads() -> list[Workload]:
    # 7 has no common factor with 16: short and long prompts alternate.
    steps = [i * 7 % NUM_PROMPTS for i in range(NUM_PROMPTS)]
    lengths = [SHORTEST + step * (LONGEST - SHORTEST) // (NUM_PROMPTS - 1) for step in steps]
    batch = tuple((i * 15, length) for i, length in enumerate(lengths))
    single = ((0, 32),)
    return [
        Workload("batch", batch, 64),
        Workload("batch, first tokens", batch, 1),
        Workload("single", single, 128),
        Workload("single, first token", single, 1),
    ]


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    what: str
    values: dict[str, float]  # by contestant, jpaged first and transformers second
    floor: float | None = None  # what JAX's matmuls alone would give
    more_is_better: bool = False

    @property
    def ratio(self) -> float:
        """How many times as fast jpaged is as transformers."""
        mine, peer = list(self.values.values())[:2]
        return mine / peer if self.more_is_better else peer / mine

    @property
    def share(self) -> float | None:
        """How much of jpaged's time is the floor."""
        mine = self.values["jpaged"]
        return self.floor and (mine / self.floor if self.more_is_better else self.floor / mine)


@dataclass
class Runs:
    """One contestant's repeats of one workload."""

    seconds: list[float] = field(default_factory=list)
    token_ids: list[list[list[int]]] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def unsteady(self) -> bool:
        """Whether something else must have had the cores for a while."""
        return max(self.seconds) > 1.3 * min(self.seconds)


Generate = Callable[[list[list[int]], int], tuple[float, list[list[int]]]]  # prompts, max_tokens -> seconds, token ids


class Peer:
    """A peer's process, spoken to in lines of JSON."""

    def __init__(self, python: str, script: Path, model: Path, threads: int) -> None:
        command = [python, str(script), str(model), "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions: dict[str, str] = self._read()["versions"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer ended with exit code {self._process.wait()}")
        return json.loads(line)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> tuple[float, list[list[int]]]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        return answer["seconds"], answer["token_ids"]

    def close(self) -> None:
        self._process.communicate()


def gguf_path(model: str) -> Path:
    """The file that the peers read."""
    from models.demo import DEMO_MODELS, pull

    path = pull(model) if model in DEMO_MODELS else Path(model)
    if not path.is_file():
        raise SystemExit(f"--model: expected a GGUF file or one of {', '.join(DEMO_MODELS)}, got {model!r}")
    return path


def start_peers(python: str, model: Path, threads: int, console: Console) -> dict[str, Peer]:
    here = Path(__file__).parent
    peers = {"transformers": Peer(python, here / "transformers_peer.py", model, threads)}
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode:
        console.print("llama.cpp: not installed")
    else:
        peers["llama.cpp"] = Peer(python, here / "llama_cpp_peer.py", model, threads)
    return peers


def jpaged_generate(llm: Any) -> Generate:
    from jpaged import SamplingParams

    def generate(prompts: list[list[int]], max_tokens: int) -> tuple[float, list[list[int]]]:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, progress=False)
        seconds = time.perf_counter() - start
        if errors := [output.error for output in outputs if output.error]:
            raise SystemExit(f"jpaged: {errors[0]}")
        return seconds, [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def floor_ms(model: Path, rows: int, repeats: int = 20) -> float:
    """Median time of the matmuls that one decode step of a Llama with this file's shapes cannot do without."""
    import gguf
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    shapes = {t.name: tuple(map(int, t.shape)) for t in gguf.GGUFReader(model).tensors if len(t.shape) == 2}
    shapes["head"] = shapes.get("output.weight", shapes["token_embd.weight"])
    num_layers = sum(name.endswith("attn_q.weight") for name in shapes)
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")

    def weight(name: str) -> jax.Array:  # [in, out], as a GGUF gives its shapes
        return jnp.asarray(rng.standard_normal(shapes[name], np.float32) * 0.02)

    layers = [[weight(f"blk.{i}.{kind}.weight") for kind in kinds] for i in range(num_layers)]
    head = weight("head")

    def norm(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    @jax.jit
    def step(layers: list[list[jax.Array]], head: jax.Array, x: jax.Array) -> jax.Array:
        for q, k, v, o, gate, up, down in layers:
            h = norm(x)
            heads = jnp.tile((h @ k) * (h @ v), (1, q.shape[1] // k.shape[1]))  # for attention: uses k and v
            x = x + (h @ q + heads) @ o
            h = norm(x)
            x = x + (jax.nn.silu(h @ gate) * (h @ up)) @ down
        return (norm(x) @ head).argmax(-1)

    x = jnp.asarray(rng.standard_normal((rows, head.shape[0]), np.float32))
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        step(layers, head, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return median(times[3:]) * 1e3


def compare(
    contestants: dict[str, Generate], tokens: list[int], repeats: int, console: Console
) -> dict[str, dict[str, Runs]]:
    """Workload -> contestant -> its repeats. Repeat 0 is the warm-up and not kept."""
    works = workloads()
    runs = {work.name: {name: Runs() for name in contestants} for work in works}
    for repeat in range(repeats + 1):
        for work in works:
            prompts = work.prompts(tokens, repeat)
            for name, generate in contestants.items():
                seconds, token_ids = generate(prompts, work.max_tokens)
                if repeat:
                    runs[work.name][name].seconds.append(seconds)
                    runs[work.name][name].token_ids.append(token_ids)
        console.print(f"repeat {repeat} of {repeats}" if repeat else "warm-up", style="dim")
    return runs


def differing(runs: dict[str, Runs]) -> dict[str, int]:
    """How many of its sequences each contestant continues with other tokens than transformers does."""
    flat = {who: [ids for answer in run.token_ids for ids in answer] for who, run in runs.items()}
    reference = flat.pop("transformers")
    return {who: sum(a != b for a, b in zip(ids, reference, strict=True)) for who, ids in flat.items()}


def figures(runs: dict[str, dict[str, Runs]], floors: dict[str, float]) -> list[Figure]:
    """Rates, step times and first tokens of the two kinds of workload, from the medians."""
    result = []
    for name, first in (("batch", "batch, first tokens"), ("single", "single, first token")):
        work = next(work for work in workloads() if work.name == name)
        count = len(work.spans)
        full = {who: run.median for who, run in runs[name].items()}
        start = {who: run.median for who, run in runs[first].items()}
        rates = {who: count * work.max_tokens / seconds for who, seconds in full.items()}
        steps = {who: (full[who] - start[who]) / (work.max_tokens - 1) * 1e3 for who in full}
        firsts = {who: seconds * 1e3 for who, seconds in start.items()}
        result += [
            Figure(f"{name} of {count}: tokens/s", rates, count / floors[name] * 1e3, more_is_better=True),
            Figure(f"{name} of {count}: decode step, ms", steps, floors[name]),
            Figure(f"{name} of {count}: first token, ms", firsts),
        ]
    return result


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file or a name that jpaged knows")
    parser.add_argument("--peer-python", required=True, help="a Python with torch, transformers and gguf")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", type=Path, help="write all figures to this JSON file")
    return parser.parse_args()


def print_report(lines: list[Figure], different: dict[str, dict[str, int]], console: Console) -> None:
    contestants = list(lines[0].values)
    table = Table("medians", *contestants, "faster", "floor", "share")
    for line in lines:
        values = [f"{value:.1f}" for value in line.values.values()]
        floor = [f"{line.floor:.1f}", f"{line.share:.0%}"] if line.floor and line.share else []
        table.add_row(line.what, *values, f"{line.ratio:.2f}x", *floor)
    console.print(table)
    console.print(
        "faster: jpaged than transformers; floor: JAX's matmuls of a decode step alone; share: of jpaged's time"
    )
    for work in workloads():
        for who, count in different[work.name].items():
            verdict = f"{count} sequences DIFFER from" if count else "the same as"
            console.print(f"tokens of {who}, {work.name}: {verdict} transformers'", style="bold red" if count else "")


def main() -> None:
    args = parse_args()
    if args.repeats < 1:
        raise SystemExit(f"--repeats: expected at least 1, got {args.repeats}")
    # XLA makes as many threads as the process may use cores; this comes before JAX starts. The peers inherit it.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    import jax

    from jpaged import LLM, SamplingParams

    console = Console()
    model = gguf_path(args.model)
    llm = LLM(args.model, enable_prefix_caching=False)  # what one workload has computed must not help the next
    tokens = list(llm.generate(TEXT, SamplingParams(max_tokens=1), progress=False)[0].prompt_token_ids)
    peers = start_peers(args.peer_python, model, args.threads, console)
    versions = {"jax": jax.__version__}
    for peer in peers.values():
        versions |= peer.versions
    console.print(f"{args.threads} threads, float32, " + ", ".join(" ".join(item) for item in versions.items()))

    generate = {"jpaged": jpaged_generate(llm)} | {name: peer.generate for name, peer in peers.items()}
    runs = compare(generate, tokens, args.repeats, console)
    for peer in peers.values():
        peer.close()
    lines = figures(runs, {"batch": floor_ms(model, NUM_PROMPTS), "single": floor_ms(model, 1)})
    different = {name: differing(of) for name, of in runs.items()}
    print_report(lines, different, console)
    for name, of in runs.items():
        for who, run in of.items():
            if run.unsteady:
                spread = f"{min(run.seconds):.2f} to {max(run.seconds):.2f} s"
                console.print(f"unsteady: {who}, {name} took {spread}; was the machine busy?", style="yellow")
    if args.save:
        document = {
            "threads": args.threads,
            "versions": versions,
            "figures": [asdict(line) | {"ratio": line.ratio, "share": line.share} for line in lines],
            "seconds": {name: {who: run.seconds for who, run in of.items()} for name, of in runs.items()},
            "sequences_differing": different,
        }
        args.save.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
