"""Tests that need a Hopper GPU: `pytest -m gpu tests/gpu` on the machine that has it."""

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def hopper():
    device = jax.devices()[0]
    if device.platform != "gpu" or getattr(device, "compute_capability", None) != "9.0":
        pytest.fail(f"tests marked gpu need a Hopper GPU, and this is {device.device_kind}")
