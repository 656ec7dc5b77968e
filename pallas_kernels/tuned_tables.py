"""Tile sizes that were the fastest where they were measured: a JSON file a GPU, which `benchmarks/tune.py` writes.

A file has a table for each kernel, and a table a row for all head dims up to its own. GPUs that were not measured take
what is best on an H100.
"""

import json
from functools import cache
from importlib.resources import files

from .devices import platform_and_kind
from .gpu import GPUS

FOLDER = files(__package__) / "tuned"


def tuned(kernel: str, head_dim: int) -> dict[str, int]:
    """The row of a kernel's table for a head dim of at most 256, on the GPU that the computation is for.

    >>> tuned("flash_forward", 128)["keys"] % 64
    0
    """
    _, kind = platform_and_kind()
    name = next((gpu.name for gpu in GPUS.values() if gpu.device_kind == kind), "h100")
    row = next(row for row in _tables(name)[kernel] if row["head_dim"] >= head_dim)
    return {field: value for field, value in row.items() if field != "head_dim"}


@cache
def _tables(name: str) -> dict:
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else _tables("h100")
