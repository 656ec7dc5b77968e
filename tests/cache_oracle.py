"""Caches to test writes and copies with, and how their bits are compared."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import KVCache


def random_cache(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32):
    """The cache and, to compare with, its pages in NumPy. Not a number in one of three places: what a write does not
    name may not so much as have zero added to it."""
    pages = [np.where(rng.random(shape) < 0.3, np.nan, rng.standard_normal(shape)).astype(dtype) for _ in range(2)]
    return pages, KVCache(*(jnp.asarray(array) for array in pages))


def bits(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}")


def assert_same_bits(cache: KVCache, pages: list[np.ndarray]) -> None:
    for name, found, expected in zip(("keys", "values"), (cache.keys, cache.values), pages, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(bits(found), bits(expected), err_msg=name)
