"""compute-sanitizer finds nothing in the kernels at small size."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tool", ["memcheck", "synccheck", "racecheck"])
def test_nothing_is_found(tool: str):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.fail("expected compute-sanitizer, of CUDA, on the PATH or under /usr/local/cuda")
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",  # an allocation each array, so that its end is seen
        "XLA_FLAGS": "--xla_gpu_enable_command_buffer=",  # launches, which the tool follows, instead of graphs
    }
    command = [sanitizer, "--tool", tool, "--kernel-name", "kernel_substring=mosaic_gpu", "--error-exitcode", "9"]
    script = Path(__file__).with_name("small_case.py")
    result = subprocess.run([*command, sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "all ran" in result.stdout
