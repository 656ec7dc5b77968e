"""Hopper kernels in Pallas' interpreter, and kernels with a mistake in them, to see that it is caught."""

import inspect
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu


def interpreted(function: Callable[..., Any], *arguments: Any) -> tuple[Any, bool]:
    """function(*arguments) by the interpreter, and whether it saw a race."""
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            result = jax.block_until_ready(jax.jit(function)(*arguments))
        return result, gpu_callbacks.get_races().races_found
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


def without_races(function: Callable[..., Any], *arguments: Any) -> Any:
    result, raced = interpreted(function, *arguments)
    assert not raced
    return result


def mutant(module: ModuleType, old: str, new: str) -> ModuleType:
    """The module with one piece of its source replaced."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{source.count(old)} times in {module.__name__}: {old}"
    changed = ModuleType(module.__name__)
    changed.__package__ = module.__package__
    exec(compile(source.replace(old, new), f"{module.__file__} with {new!r} for {old!r}", "exec"), changed.__dict__)
    return changed


def is_caught(function: Callable[..., Any], arguments: tuple[Any, ...], check: Callable[[Any], None]) -> bool:
    """Whether a mistake is found out: by an assertion about the result, by a race, or by not ending well."""
    try:
        result, raced = interpreted(function, *arguments)
        check(result)
    except (AssertionError, jax.errors.JaxRuntimeError):
        return True
    return raced


def caught(run: Callable[[], tuple[Any, bool]], judge: Callable[[Any], None]) -> bool:
    """Whether a mistake shows: as a barrier or a store in a wrong state, which the interpreter raises as an error; as
    a race; or as a wrong result."""
    try:
        out, raced = run()
    except jax.errors.JaxRuntimeError as error:
        return re.search(r"[Bb]arrier|copy_smem_to_gmem", str(error)) is not None
    try:
        judge(out)
    except AssertionError:
        return True
    return raced
