"""The matrix product under every projection: weights as checkpoints store them, [out, in]."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

FEW_ROWS = 128


def linear(
    weight: Float[Array, "out in"], x: Float[Array, "*B in"], *, out_dtype: DTypeLike | None = None
) -> Float[Array, "*B out"]:
    """x @ weight.T, in the dtype of x unless another is asked for.

    A CPU that decodes has few rows and much weight. Then its matmul is a quarter faster with the weight on the left
    and the rows as columns, [out, in] @ [in, rows], than either way round with the weight on the right, and
    for a single row twice as fast as x @ weight.T.
    """
    rows = x.reshape(-1, x.shape[-1])

    def weight_right(weight: Array, rows: Array) -> Array:
        return jnp.einsum("ri,oi->ro", rows, weight, preferred_element_type=out_dtype)

    def weight_left(weight: Array, rows: Array) -> Array:
        # The barriers keep XLA from folding the transposes into the product, which makes it x @ weight.T again.
        columns = lax.optimization_barrier(rows.T)
        out = jnp.einsum("oi,ir->or", weight, columns, preferred_element_type=out_dtype)
        return lax.optimization_barrier(out).T

    if len(rows) <= FEW_ROWS:
        out = lax.platform_dependent(weight, rows, cpu=weight_left, default=weight_right)
    else:
        out = weight_right(weight, rows)
    return out.reshape(*x.shape[:-1], -1)
