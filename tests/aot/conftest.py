"""Tests that compile for GPUs which are not here: `make aot`, in an environment that has the CUDA compiler."""

import jax
import pytest

from pallas_kernels import aot


@pytest.fixture(scope="session", autouse=True)
def cuda_compiler():
    jax.config.update("jax_platforms", "cpu")  # no card is looked for
    aot.mesh()
