"""Runs Hopper kernels in Pallas' interpreter, with race detection."""

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu


def interpreted(function, *arguments):
    """function(*arguments) by the interpreter, which must see no race."""
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            result = jax.block_until_ready(jax.jit(function)(*arguments))
        assert not gpu_callbacks.get_races().races_found
        return result
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()
