"""What the xla backend promises beside exact results: memory linear in the lengths, and tiles left out."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMask, flash_attention


def temporary_bytes(length: int, implementation: Any) -> int:
    """Of forward and backward, one head of 64 in float32."""
    x = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)
    attend = partial(flash_attention, implementation=implementation)

    def gradients(query, key, value, cotangent):
        return jax.vjp(attend, query, key, value)[1](cotangent)

    analysis: Any = jax.jit(gradients).lower(x, x, x, x).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def test_memory_is_a_fiftieth_of_the_plain_formula_at_16384_and_linear_to_131072():
    short = temporary_bytes(16_384, "xla")
    # The plain formula holds at least the float32 probabilities and their gradient.
    plain = temporary_bytes(16_384, "reference")
    assert plain >= 2 * 4 * 16_384**2
    assert short <= 0.02 * plain
    assert temporary_bytes(131_072, "xla") <= 8.5 * short


LENGTH = 1024
FIRST = np.arange(LENGTH) < 512
SEGMENTS = jnp.asarray(np.where(FIRST, 3, 5)[None], jnp.int32)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"is_causal": True}, FIRST),
        ({"local_window_size": (100, 0), "query_offset": -LENGTH // 2}, FIRST | ~FIRST),
        ({"key_value_seq_lengths": jnp.array([512], jnp.int32)}, FIRST | ~FIRST),
        ({"segment_ids": SEGMENTS}, FIRST),
        ({"block_mask": BlockMask(np.array([[True, False], [True, True]]), 512, 512)}, FIRST),
        ({"block_mask": BlockMask(np.tri(8, dtype=bool), 128, 128)}, FIRST),
        ({"block_mask": BlockMask(np.array([[[True, False]], [[True, False]]]), LENGTH, 512)}, FIRST | ~FIRST),
    ],
    ids=lambda options: "+".join(options) if isinstance(options, dict) else "",
)
def test_tiles_that_no_row_sees_are_not_computed(options, rows):
    """NaN there reaches no row: a product with it would, whatever is hidden afterwards."""
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((1, LENGTH, 2, 8)), jnp.float32) for _ in range(3))

    @jax.jit
    def run(key, value):
        out, pull_back = jax.vjp(lambda query: flash_attention(query, key, value, **options), query)
        return out, *pull_back(jnp.ones_like(out))

    planted = jnp.where(jnp.asarray(FIRST)[None, :, None, None], jnp.float32(0), jnp.float32(jnp.nan))
    for clean, found in zip(run(key, value), run(key + planted, value + planted), strict=True):
        np.testing.assert_array_equal(found[0, rows], clean[0, rows])
        assert np.isnan(found[0, ~rows]).all()
