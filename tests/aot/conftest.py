"""Tests that compile for GPUs which are not here: `make aot`, in an environment that has the CUDA compiler."""

import jax
import jaxtyping
import pytest

from pallas_kernels import aot

jax.config.update("jax_platforms", "cpu")  # no card is looked for
jaxtyping.config.update("jaxtyping_disable", True)  # descriptions of arrays stand in their places


@pytest.fixture(scope="session", autouse=True)
def cuda_compiler():
    aot.mesh()
