"""Everything that is measured on a GPU, in one command: each benchmark in a process of its own, one after the other.

    python benchmarks/gpu.py FOLDER [--peer-python PATH/TO/python] [--quick]

Prints the tables of `attention_gpu.py`, `paged_attention.py`, `cache_ops.py` and `engine_gpu.py`, and saves their
figures as FOLDER/NAME.json. The peer's Python has PyTorch and transformers. With --quick each runs a few of its shapes.
On a CPU all run at small size, to show that they work. Exits with 1 where one has failed.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def commands(peer_python: str | None, quick: bool) -> dict[str, list[str]]:
    """The arguments of each benchmark."""
    peer = ["--peer-python", peer_python] if peer_python else []
    return {
        "attention_gpu": [*peer, *(["--lengths", "4096", "--head-dims", "128"] if quick else [])],
        "paged_attention": ["--what", "decode,blocks,prefill"],
        "cache_ops": ["--block-sizes", "16" if quick else "16,64,256"],
        "engine_gpu": [*peer, *(["--models", "1b"] if quick else [])],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer-python", help="a Python with PyTorch and transformers, to measure them too")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, options in commands(arguments.peer_python, arguments.quick).items():
        start = time.perf_counter()
        save = ["--json", str(arguments.folder / f"{name}.json")]
        print(f"{name}.py {' '.join(options)}", flush=True)
        if subprocess.run([sys.executable, str(HERE / f"{name}.py"), *options, *save]).returncode:
            failed.append(name)
        print(f"{name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
