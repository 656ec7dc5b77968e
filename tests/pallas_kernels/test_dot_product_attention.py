"""flash_attention in the place of jax.nn.dot_product_attention: JAX's own cases, options, broadcasting and errors."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import BFLOAT16, assert_as_exact

from pallas_kernels import flash_attention

theirs = partial(jax.nn.dot_product_attention, implementation="xla")
ours = flash_attention
B, T, S, N, H = 2, 128, 128, 4, 32


@pytest.fixture(autouse=True)
def jax_defaults():
    """jax.nn's own code does not pass under this suite's strict settings."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def normal(*shape, dtype=jnp.bfloat16, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def out_and_gradients(function, arrays, cotangent):
    @jax.jit
    def run(arrays):
        out, pull_back = jax.vjp(lambda arrays: function(*arrays), arrays)
        return out, *pull_back(cotangent)[0]

    return run(arrays)


def in_float32(x):
    return x.astype(jnp.float32)


def assert_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a.astype("float32"), b.astype("float32"), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("use_vmap", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_heads_and_vmap(dtype, groups, use_vmap):
    q, cotangent = normal(B, T, N, H, dtype=dtype), normal(B, T, N, H, dtype=dtype, seed=1)
    k, v = (normal(B, S, N // groups, H, dtype=dtype, seed=seed) for seed in (2, 3))
    found = out_and_gradients(jax.vmap(ours) if use_vmap else ours, (q, k, v), cotangent)
    if dtype == jnp.float16:  # which a CPU cannot multiply there
        arrays, of_out = jax.tree.map(in_float32, ((q, k, v), cotangent))
        expected = [x.astype(dtype) for x in out_and_gradients(theirs, arrays, of_out)]
    else:
        expected = out_and_gradients(theirs, (q, k, v), cotangent)
    assert_close(found, expected, 0.01)


@pytest.mark.parametrize(
    "modes",
    [
        ("bias",),
        ("causal",),
        ("padding",),
        ("custom",),
        ("causal", "padding"),
        ("custom", "padding"),
        ("bias", "causal"),
        ("causal", "sliding_window"),
        ("sliding_window",),
    ],
    ids="+".join,
)
def test_masks(modes):
    q, k, v, cotangent = (normal(B, n, N, H, seed=i) for i, n in enumerate((T, S, S, T)))
    options: dict[str, Any] = {"is_causal": "causal" in modes}
    if "padding" in modes:
        options["query_seq_lengths"] = jnp.array([T // 2, T // 4], jnp.int32)
        options["key_value_seq_lengths"] = jnp.array([S // 4, S // 2], jnp.int32)
    if "custom" in modes:
        options["mask"] = jnp.tril(jnp.ones((T, S), bool))[None, None]
    if "sliding_window" in modes:
        options["local_window_size"] = (3, 2) if "causal" in modes else (3, 0)
    arrays = (q, k, v, normal(1, N, T, S)) if "bias" in modes else (q, k, v)
    found, expected = (out_and_gradients(partial(f, **options), arrays, cotangent) for f in (ours, theirs))
    assert_close(found, expected, 0.02)


@pytest.mark.parametrize("use_vmap", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_bias_gradient_with_a_mask_of_three_dimensions(batch, use_vmap):
    x, bias, mask = normal(batch, S, N, H), normal(batch, N, S, S), jnp.ones((1, 1, S), bool)

    def attention(function, x, bias):
        return function(query=x, key=x, value=x, bias=bias, mask=mask, is_causal=False)

    def run(function, x, bias):
        attend = partial(attention, function)
        return out_and_gradients(jax.vmap(attend) if use_vmap else attend, (x, bias), x)

    found, theirs_found = run(ours, x, bias), run(theirs, x, bias)
    exact = run(theirs, in_float32(x), in_float32(bias))
    # The diagonal's large logits leave either with errors of some hundredths.
    for one, ref, low in zip(found, exact, theirs_found, strict=True):
        assert one.dtype == low.dtype
        assert_as_exact(one, ref, low, BFLOAT16)


@pytest.mark.parametrize(
    ("bias_shape", "mask_shape"),
    [
        ((B, N, 9, 13), (B, N, 9, 13)),
        ((1, N, 9, 13), (1, 1, 9, 13)),
        ((B, 1, 1, 13), (1, N, 1, 13)),
        ((1, 1, 9, 1), (B, 1, 9, 1)),
        ((N, 9, 13), (1, 9, 13)),
        ((1, 1, 1, 1), (1, 1, 1)),
    ],
    ids=str,
)
def test_bias_and_mask_broadcast(bias_shape, mask_shape):
    q, k, v = (normal(B, n, N, H, dtype=jnp.float32, seed=i) for i, n in enumerate((9, 13, 13)))
    bias = normal(*bias_shape, dtype=jnp.float32)
    mask = jnp.asarray(np.random.default_rng(0).random(mask_shape) < 0.8)
    sees = np.broadcast_to(mask, (B, N, 9, 13)).any(-1).swapaxes(1, 2)
    assert sees.any()
    cotangent = jnp.where(sees[..., None], normal(B, 9, N, H, dtype=jnp.float32, seed=4), 0)

    def attention(function, q, k, v, bias):  # rows that see nothing average all values there, and are zero here
        return jnp.where(sees[..., None], function(q, k, v, bias, mask), 0)

    arrays = (q, k, v, bias)
    found, expected = (out_and_gradients(partial(attention, f), arrays, cotangent) for f in (ours, theirs))
    assert_close(found, expected, 2e-5)


@pytest.mark.parametrize("ndim", [3, 4])
def test_residual_and_missing_batch(ndim):
    q, k, v = (normal(B, n, h, H, dtype=jnp.float32)[(0,) * (4 - ndim)] for n, h in ((9, 4), (13, 2), (13, 2)))
    found, expected = (f(q, k, v, is_causal=True, scale=0.2, return_residual=True) for f in (ours, theirs))
    assert_close(found, expected, 1e-5)


def test_numpy_arrays_are_taken():
    q = np.random.default_rng(0).standard_normal((1, 5, 2, 8)).astype(np.float32)
    np.testing.assert_allclose(ours(q, q, q), theirs(q, q, q), atol=1e-6)


@pytest.mark.usefixtures("no_annotation_checks")
@pytest.mark.parametrize(
    "change",
    [
        {"query": jnp.zeros((B, T, N, H + 1))},
        {"query": jnp.zeros((B + 1, T, N, H))},
        {"query": jnp.zeros((B, T, 3, H))},
        {"value": jnp.zeros((B, S, 2, H), jnp.bfloat16)},
        {"value": jnp.zeros((B, S + 1, 2, H))},
        {"mask": jnp.zeros((B, N, T, S))},
        {"query_seq_lengths": jnp.zeros((B + 1,), jnp.int32)},
        {"key_value_seq_lengths": jnp.zeros((B,), jnp.uint32)},
        {"implementation": "flash"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_raises_there_raises_here(change):
    arguments = {"query": jnp.zeros((B, T, N, H)), "key": jnp.zeros((B, S, 2, H)), "value": jnp.zeros((B, S, 2, H))}
    for function in (jax.nn.dot_product_attention, ours):
        with pytest.raises(ValueError):  # noqa: PT011 - the words differ
            function(**arguments | change)
