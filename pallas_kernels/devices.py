"""Which device a computation is for, and whether the Hopper kernels run there."""

import math
import re
from importlib import import_module
from types import ModuleType
from typing import Literal

import jax

from .kv_cache import KVCache

Implementation = Literal["mosaic", "xla"]


def platform_and_kind() -> tuple[str, str]:
    """Of the device that the computation is for: of the mesh in context, else the default one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.config.jax_default_device or jax.devices()[0]
    return (device, device) if isinstance(device, str) else (device.platform, device.device_kind)


def lacks_mosaic() -> str | None:
    """Why the Hopper kernels cannot run here, or None: on a Hopper GPU, and where Pallas interprets them."""
    _, kind = platform_and_kind()
    if re.search(r"\bG?H(100|200|800|20)\b", kind) or interpreted():
        return None
    return f"its kernels are for Hopper GPUs (H100, H200), and this is {kind}"


def lacks_own_shard(array: jax.Array) -> str | None:
    """Why a kernel cannot take an array that XLA lays out over several devices, or None. XLA cannot divide a kernel: it
    would gather the whole array on each device."""
    mesh = jax.typeof(array).sharding.mesh
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    devices = math.prod(size for size, kind in axes if kind != jax.sharding.AxisType.Manual)
    return f"its array is spread over {devices} devices: call it inside jax.shard_map" if devices > 1 else None


def mosaic_module(operation: str, implementation: Implementation | None, cache: KVCache) -> ModuleType | None:
    """The module of an operation's Hopper kernel where that is to serve this cache; None where XLA is.

    Raises ValueError for an unknown implementation, NotImplementedError where "mosaic" is asked for and cannot serve.
    """
    if implementation not in (None, "mosaic", "xla"):
        raise ValueError(f"{operation}: implementation must be 'mosaic', 'xla' or None, got {implementation!r}")
    if implementation == "xla":
        return None
    reason, module = lacks_mosaic() or lacks_own_shard(cache.keys), None
    if reason is None:
        # Imported at first use: only a GPU needs Mosaic, and loading it takes a while.
        module = import_module(f".{operation}_mosaic", __package__)
        reason = module.unsupported(cache)
    if reason is None:
        return module
    if implementation == "mosaic":
        raise NotImplementedError(f"{operation}: mosaic cannot serve: {reason}")
    return None


def interpreted() -> bool:
    """Whether kernels run in Pallas' interpreter, as tests on a CPU let them. It knows neither aliased shared memory
    nor a left operand of wgmma in registers."""
    from jax._src import config  # the one place that says so

    return config.pallas_tpu_interpret_mode_context_manager.value is not None
