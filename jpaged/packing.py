"""Many small arrays as one: a step uploads one buffer for its model and one for its sampler, not twenty."""

from math import prod
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

ALIGNMENT = 64  # words: kernels read an array where it lies in the buffer, and want 256 bytes


class Field(NamedTuple):
    """An array's place: what is known of it before it comes."""

    start: int
    shape: tuple[int, ...]
    dtype: np.dtype  # of four bytes


Layout = tuple[Field, ...]


def layout_of(arrays: tuple[np.ndarray, ...]) -> Layout:
    """The places of arrays whose items have four bytes each. Raises TypeError for others."""
    fields, start = [], 0
    for array in arrays:
        if array.itemsize != 4:
            raise TypeError(f"expected arrays of a dtype of four bytes, got {array.dtype}")
        fields.append(Field(start, array.shape, array.dtype))
        start += -(-array.size // ALIGNMENT) * ALIGNMENT
    return tuple(fields)


def pack(arrays: tuple[np.ndarray, ...]) -> Int32[np.ndarray, " n"]:
    """The arrays' bits, each in its place."""
    parts = []
    for array in arrays:
        parts += [array.reshape(-1).view(np.int32), _PADDING[: -array.size % ALIGNMENT]]
    return np.concatenate(parts)


def unpack(packed: Int32[Array, " n"], layout: Layout) -> list[Array]:
    """The arrays again, on the device."""

    def take(field: Field) -> Array:
        bits = lax.slice(packed, (field.start,), (field.start + prod(field.shape),))
        return lax.bitcast_convert_type(bits, jnp.dtype(field.dtype)).reshape(field.shape)

    return [take(field) for field in layout]


_PADDING = np.zeros(ALIGNMENT, np.int32)
