"""How many blocks of KV cache fit a device."""

from typing import Any

import psutil
from jaxtyping import Array

CPU_CACHE_BYTES = 2 << 30


def num_blocks_that_fit(
    *, block_bytes: int, wanted: int | None, most_useful: int, memory_utilization: float, beside: Array
) -> int:
    """The number of blocks to allocate: `wanted`, or as many as fit, but no more than `most_useful`.

    They go to the device that the weight `beside` is on. Raises ValueError, with what would fit, where `wanted`
    blocks do not, or not even one does.
    """
    device = min(beside.devices(), key=lambda device: device.id)
    free = _free_bytes(device, memory_utilization)
    fitting = free // block_bytes
    if (wanted or 1) > fitting:
        raise ValueError(
            f"num_blocks: {wanted or 1} blocks of {_mib(block_bytes)} need {_mib((wanted or 1) * block_bytes)}, "
            f"and {_mib(free)} of the device's memory are free for them: {fitting} blocks fit"
        )
    if wanted is not None:
        return wanted
    if device.platform == "cpu":
        fitting = max(1, min(fitting // 2, CPU_CACHE_BYTES // block_bytes))
    return min(fitting, most_useful)


def _free_bytes(device: Any, memory_utilization: float) -> int:
    if device.platform == "cpu":
        return int(psutil.virtual_memory().available * memory_utilization)
    stats = device.memory_stats()
    if stats is None:
        raise ValueError(f"num_blocks: {device} does not say how much memory it has; give their number")
    return int(stats["bytes_limit"] * memory_utilization) - stats["bytes_in_use"]


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
