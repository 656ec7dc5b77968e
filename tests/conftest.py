"""Settings that forgive nothing: strict dtypes and ranks, shapes checked at run time, two fake devices."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Read when JAX starts its CPU client. The devices share one thread pool, so matmuls are as fast as with one.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
# In the interpreter of Pallas each warpgroup of a kernel is a thread of JAX's pool, and they wait for each other: with
# as few threads as this machine may have cores, those that wait leave none for the one they wait for.
os.environ.setdefault("NPROC", "8")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Functions annotated with shapes are checked against them at each call. Host code has none, and checks types itself.
install_import_hook(
    ["pallas_kernels", "models.llama", "models.rotary", "jpaged.generation", "jpaged.runner", "jpaged.sampler"],
    "beartype.beartype",
)


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled programs between runs, among pytest's own caches (`--cache-clear` forgets them)."""
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The demo model's GGUF file, downloaded at first use and kept under $JPAGED_HOME."""
    from models.demo import pull

    return pull()
