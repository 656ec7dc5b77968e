"""flash_attention on a Hopper GPU, beside cuDNN, PyTorch and tokamax in the same run.

    python benchmarks/attention_gpu.py [--head-dims 128,64,256] [--lengths 4096,16384,8192,2048] [--json FILE]
                                       [--peer-python PATH/TO/python]

Attention: bf16, batch * length = 16,384, heads * head dim = 2,048; 4 T^2 H operations a head forward, 2.5 times that
backward, half of it where causal. Backward is forward and backward less forward, at head dims up to 128. Each figure is
the median over repeats of the mean of many calls, and the contestants take turns in each repeat. PyTorch runs in a
process of its own while the others are compiled, under this Python or the one that is named; it is left out where that
has none, and so is tokamax. On a CPU the xla kernels run at small size, to show that it works.
"""

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from measure import DTYPE, ON_GPU, Figures, compile_all, seconds

from pallas_kernels import flash_attention

TOKENS, WIDTH = (16_384, 2_048) if ON_GPU else (256, 256)


@dataclass(frozen=True)
class Problem:
    head_dim: int
    length: int
    causal: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return max(TOKENS // self.length, 1), self.length, WIDTH // self.head_dim, self.head_dim

    @property
    def backward(self) -> bool:
        return self.head_dim <= 128

    @property
    def forward_flops(self) -> float:
        batch, length, heads, head_dim = self.shape
        return 4.0 * batch * heads * length**2 * head_dim / (2 if self.causal else 1)

    def row(self, contestant: str, forward: float, both: float | None) -> dict[str, Any]:
        """What is reported; seconds are given."""
        row = {"head dim": self.head_dim, "length": self.length, "causal": self.causal, "contestant": contestant}
        row["forward TFLOP/s"] = self.forward_flops / forward / 1e12
        if both is not None:
            row["backward TFLOP/s"] = 2.5 * self.forward_flops / (both - forward) / 1e12
        return row


def contestants() -> dict[str, Callable[..., jax.Array]]:
    """Attention of query, key, value by name."""
    if not ON_GPU:
        return {"xla": partial(flash_attention, implementation="xla")}
    found: dict[str, Callable[..., jax.Array]] = {
        "jpaged": partial(flash_attention, implementation="mosaic"),
        "cuDNN": partial(flash_attention, implementation="cudnn"),
    }
    if importlib.util.find_spec("tokamax"):
        import tokamax  # pyright: ignore[reportMissingImports]

        found["tokamax"] = partial(tokamax.dot_product_attention, implementation="mosaic")
    return found


def compile_problems(problems: list[Problem]) -> dict[tuple[Problem, str, str], Callable[..., Any]]:
    """By problem, contestant, and "forward" or "both"."""
    programs = {}
    for problem, (name, attention) in itertools.product(problems, contestants().items()):
        attend = partial(attention, is_causal=problem.causal)

        def both(query, key, value, cotangent, attend: Any = attend):
            return jax.vjp(attend, query, key, value)[1](cotangent)

        array = jax.ShapeDtypeStruct(problem.shape, DTYPE)
        programs[problem, name, "forward"] = attend, (array,) * 3
        if problem.backward:
            programs[problem, name, "both"] = both, (array,) * 4
    return compile_all(programs)


def measure(
    problems: list[Problem], compiled: dict[tuple[Problem, str, str], Callable[..., Any]], figures: Figures
) -> None:
    for problem in problems:
        arrays = [jax.random.normal(jax.random.key(i), problem.shape, DTYPE) for i in range(4)]
        times = seconds(
            {
                (name, what): partial(program, *arrays[: 3 if what == "forward" else 4])
                for (of, name, what), program in compiled.items()
                if of == problem
            }
        )
        for name in dict.fromkeys(name for name, _ in times):
            figures.add("attention", problem.row(name, times[name, "forward"], times.get((name, "both"))))


def start_peer(python: str, problems: list[Problem]) -> subprocess.Popen[str]:
    """PyTorch's attention backends, by `torch_attention_peer.py`."""
    script = Path(__file__).with_name("torch_attention_peer.py")
    peer = subprocess.Popen([python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert peer.stdin is not None
    with peer.stdin as given:
        json.dump([{"shape": p.shape, "causal": p.causal, "backward": p.backward} for p in problems], given)
    return peer


def report_peer(peer: subprocess.Popen[str], problems: list[Problem], figures: Figures) -> None:
    assert peer.stdout is not None
    for line in map(json.loads, peer.stdout):
        both = line["both"]
        figures.add("attention", problems[line["problem"]].row(line["name"], line["forward"], both))
    if peer.wait():
        print(f"PyTorch's process failed with status {peer.returncode}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", default="128,64,256" if ON_GPU else "64,128")
    parser.add_argument("--lengths", default="4096,16384,8192,2048" if ON_GPU else "128")
    parser.add_argument("--peer-python", help="a Python with PyTorch, where this one has none")
    parser.add_argument("--json", type=Path, help="save all figures there")
    arguments = parser.parse_args()
    groups = [
        [
            Problem(head_dim, length, causal)
            for length in map(int, arguments.lengths.split(","))
            for causal in (False, True)
        ]
        for head_dim in map(int, arguments.head_dims.split(","))
    ]
    problems = list(itertools.chain(*groups))
    figures = Figures(arguments.json)
    python = arguments.peer_python or (sys.executable if ON_GPU and importlib.util.find_spec("torch") else None)
    peer = start_peer(python, problems) if python else None
    for group in groups:
        compiled = compile_problems(group)
        if peer:  # two at once would time each other
            report_peer(peer, problems, figures)
            peer = None
        measure(group, compiled, figures)


if __name__ == "__main__":
    main()
