"""Everything that is measured on a GPU, in one command of at most eight minutes.

    python benchmarks/gpu.py FOLDER [--parts decode,attention,...] [--seconds 470]

Each part is a script beside this one, in a process of its own, one after the other, what matters most first. A figure
is printed when it is known and saved in FOLDER/PART.json with those before it, so a part that runs out of its time
loses only what was still to come. PyTorch, transformers and tokamax are measured too where this Python has them. On a
CPU all run at small size, to show that they work. Exits with 1 where a part failed or was cut off.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Part(NamedTuple):
    script: str
    arguments: list[str]
    seconds: float  # at most


def parts_of(backend: str) -> dict[str, Part]:
    """In the order in which they run."""
    if backend != "gpu":
        return {
            "decode": Part("paged_attention.py", ["--what", "decode,blocks,prefill"], 120),
            "attention": Part("attention_gpu.py", [], 120),
            "engine": Part("engine_gpu.py", ["--models", "tiny"], 120),
            "cache_ops": Part("cache_ops.py", ["--block-sizes", "16"], 120),
        }
    peer = ["--peer"] if importlib.util.find_spec("transformers") else []
    return {
        "decode": Part("paged_attention.py", ["--what", "decode,blocks,prefill"], 120),
        "attention": Part("attention_gpu.py", [], 150),
        "engine_1b": Part("engine_gpu.py", ["--models", "1b", *peer], 150),
        "cache_ops": Part("cache_ops.py", ["--block-sizes", "16,64,256"], 60),
        "engine_8b": Part("engine_gpu.py", ["--models", "8b"], 150),
    }


def run(part: Part, save: Path, seconds: float) -> str | None:
    """What went wrong, or None."""
    command = [sys.executable, str(HERE / part.script), *part.arguments, "--json", str(save)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(min(seconds, part.seconds))
        return f"failed with status {status}" if status else None
    except subprocess.TimeoutExpired:
        return "was cut off"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the peers that it started
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", help="some of them, in this order")
    parser.add_argument("--seconds", type=float, default=470, help="for all parts together")
    arguments = parser.parse_args()
    start = time.monotonic()
    # In a process of its own: one that holds the card would keep memory from the others.
    backend = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    parts = parts_of(subprocess.run(backend, check=True, capture_output=True, text=True).stdout.strip())
    names = arguments.parts.split(",") if arguments.parts else list(parts)
    if unknown := set(names) - parts.keys():
        parser.error(f"--parts: expected some of {', '.join(parts)}, got {', '.join(sorted(unknown))}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    troubles = []
    for name in names:
        before = time.monotonic()
        print(f"--- {name}: {parts[name].script} {' '.join(parts[name].arguments)}", flush=True)
        if trouble := run(parts[name], arguments.folder / f"{name}.json", arguments.seconds - (before - start)):
            troubles.append(f"{name} {trouble}")
        print(f"--- {name}: {time.monotonic() - before:.0f} s, {trouble or 'done'}", flush=True)
    if troubles:
        raise SystemExit("; ".join(troubles))


if __name__ == "__main__":
    main()
