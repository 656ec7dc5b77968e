"""Arrays through one buffer and back, bit for bit."""

import jax
import numpy as np
import pytest

from jpaged.packing import layout_of, pack, unpack


def test_arrays_come_back_bit_for_bit():
    arrays = (
        np.array([[1, -2], [3, 2**31 - 1]], np.int32),
        np.array(7, np.int32),
        np.zeros((3, 0), np.uint32),
        np.array([0.5, -0.0, np.inf, np.nan], np.float32),
        np.array([2**32 - 1], np.uint32),
    )
    packed = pack(arrays)
    assert packed.shape == (4 * 64,)  # one array has no items, each other one 64 words
    unpacked = jax.jit(unpack, static_argnums=1)(packed, layout_of(arrays))
    for found, expected in zip(unpacked, arrays, strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert np.asarray(found).tobytes() == expected.tobytes()


def test_only_items_of_four_bytes_have_a_place():
    with pytest.raises(TypeError, match="four bytes, got int64"):
        layout_of((np.zeros(3, np.int64),))
