"""Dense attention and its gradients against the formulas written out in NumPy.

The rule, for the formula in float64 (ref) and in the kernel's own dtype (low): max|out - ref| is at most twice
max|low - ref| plus what adding and subtracting 0.3 costs in that dtype; three times for gradients.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import flash_attention

BFLOAT16 = ml_dtypes.bfloat16


def softmax_attention(arrays, dtype, *, scale=None, logits_soft_cap=None, **visibility):
    """Output and log-sum-exp, and what the backward pass needs; every result is rounded to dtype."""

    def rounded(x):
        return x.astype(dtype).astype(x.dtype)

    work = np.float64 if dtype == np.float64 else np.float32
    q, k, v = (arrays[name].astype(work) for name in ("query", "key", "value"))
    repeats = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, repeats, axis=2), np.repeat(v, repeats, axis=2)
    scale = work(q.shape[-1] ** -0.5 if scale is None else scale)
    logits = rounded(rounded(np.einsum("btnh,bsnh->bnts", q, k)) * scale)
    slope = np.ones_like(logits)
    if logits_soft_cap is not None:
        tanh = np.tanh(logits / work(logits_soft_cap))
        logits, slope = rounded(work(logits_soft_cap) * tanh), 1 - tanh**2
    if "bias" in arrays:
        logits = rounded(logits + arrays["bias"].astype(work))
    visible = visible_keys(arrays, logits.shape, **visibility)
    highest = np.where(visible, logits, -np.inf).max(-1, keepdims=True, initial=-1e30)
    weights = np.where(visible, rounded(np.exp(np.minimum(logits - highest, 0))), 0)
    total = weights.sum(-1, keepdims=True)
    probs = rounded(weights / np.where(total == 0, 1, total))
    with np.errstate(divide="ignore"):
        residual = np.where(total == 0, -np.inf, highest + np.log(total))
    out = rounded(np.einsum("bnts,bsnh->btnh", probs, v))
    return out, np.moveaxis(residual[..., 0], 1, 2), (q, k, v, scale, slope, probs, rounded)


def visible_keys(arrays, shape, *, is_causal=False, query_offset=0, local_window_size=None):
    B, _, T, S = shape
    row, key = np.arange(T)[:, None], np.arange(S)[None, :]
    position = row + query_offset
    visible = np.ones((B, 1, T, S), bool)
    if is_causal:
        visible &= key <= position
    if local_window_size is not None:
        left, right = np.broadcast_to(local_window_size, 2)
        visible &= (position - left <= key) & (key <= position + right)
    for b in range(B):
        if "query_seq_lengths" in arrays:
            visible[b] &= row < arrays["query_seq_lengths"][b]
        if "key_value_seq_lengths" in arrays:
            visible[b] &= key < arrays["key_value_seq_lengths"][b]
        if "segment_ids" in arrays:
            of_query, of_key = arrays["segment_ids"]
            visible[b] &= np.equal.outer(of_query[b], of_key[b])
    return visible & arrays.get("mask", True)


def gradients(arrays, d_out, d_residual, dtype, **options):
    """d query, d key, d value and d bias by hand: section 3.1 of arXiv 2307.08691, and d residual beside it."""
    q, k, v, scale, slope, probs, rounded = softmax_attention(arrays, dtype, **options)[2]
    work = q.dtype
    d_out, d_residual = d_out.astype(work), d_residual.astype(work)
    d_probs = rounded(np.einsum("btnh,bsnh->bnts", d_out, v))
    rows = (probs * d_probs).sum(-1, keepdims=True) - np.moveaxis(d_residual, 2, 1)[..., None]
    d_bias = rounded(probs * (d_probs - rows))
    d_logits = rounded(d_bias * slope * scale)
    K = arrays["key"].shape[2]

    def grouped(x):
        return x.reshape(*x.shape[:2], K, -1, x.shape[-1]).sum(3)

    found = {
        "query": np.einsum("bnts,bsnh->btnh", d_logits, k),
        "key": grouped(np.einsum("bnts,btnh->bsnh", d_logits, q)),
        "value": grouped(np.einsum("bnts,btnh->bsnh", probs, d_out)),
    }
    if "bias" in arrays:
        ones = tuple(axis for axis, size in enumerate(arrays["bias"].shape) if size == 1)
        found["bias"] = d_bias.sum(ones, keepdims=True)
    return {name: rounded(x) for name, x in found.items()}


def assert_as_exact(out, ref, low, dtype, factor=2.0, name=""):
    """The rule of this file, for what is finite; what is not must be equal."""
    out, ref, low = (np.asarray(x).astype(np.float64) for x in (out, ref, low))
    assert out.shape == ref.shape
    finite = np.isfinite(ref)
    np.testing.assert_array_equal(out[~finite], ref[~finite], err_msg=name)
    if finite.any():
        out, ref, low = out[finite], ref[finite], low[finite]
        shifted = ((ref.astype(dtype) + dtype(0.3)) - dtype(0.3)).astype(np.float64)
        allowed = factor * np.abs(low - ref).max() + 2 * np.abs(shifted - ref.astype(dtype).astype(np.float64)).max()
        assert np.abs(out - ref).max() <= allowed, name


class Case(NamedTuple):
    T: int
    S: int
    N: int = 4
    K: int = 2
    H: int = 32
    data: tuple[str, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012

    def __str__(self):
        words = [f"{name}={value}".replace(" ", "") for name, value in self.options.items()]
        return "-".join([f"{self.T}x{self.S}", f"{self.N}/{self.K}", f"H{self.H}", *self.data, *words])


CASES = [
    Case(1, 1),
    Case(1, 147, K=1),
    Case(239, 1, N=2, data=("bias",)),
    Case(113, 203, K=4),
    Case(113, 203, H=40, options={"is_causal": True}),
    Case(127, 113, N=3, K=1, options={"is_causal": True, "query_offset": 40}),
    Case(37, 53, options={"is_causal": True, "query_offset": -9}),  # the first rows see nothing
    Case(127, 513, N=2, K=1, H=80, options={"is_causal": True, "query_offset": 386, "logits_soft_cap": 15.0}),
    Case(65, 65, H=17, options={"local_window_size": 7}),
    Case(64, 96, options={"local_window_size": (0, 5), "query_offset": 60}),  # rows past key 96 see nothing
    Case(64, 64, options={"local_window_size": (9, 0), "is_causal": True, "logits_soft_cap": 2.0}),
    Case(33, 65, data=("bias", "mask"), options={"scale": 0.5, "is_causal": True, "query_offset": 32}),
    Case(33, 65, data=("row_bias", "head_mask")),
    Case(77, 77, data=("query_seq_lengths", "key_value_seq_lengths")),
    Case(77, 77, N=6, K=3, data=("segment_ids",), options={"is_causal": True}),
    Case(31, 77, data=("two_segment_ids", "key_value_seq_lengths"), options={"logits_soft_cap": 30.0}),
]
BATCH = 2


def make(case, dtype: Any = np.float32):
    """The arrays of a case, by argument; logits spread wide enough for softmax to matter."""
    rng = np.random.default_rng(case.T * 1000 + case.S)
    T, S, N, K, H = case[:5]

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    arrays: dict[str, Any] = {
        "query": (2 * normal(BATCH, T, N, H)).astype(dtype),
        "key": normal(BATCH, S, K, H),
        "value": normal(BATCH, S, K, H),
    }
    for name in case.data:
        match name:
            case "bias":
                arrays["bias"] = normal(BATCH, N, T, S)
            case "row_bias":
                arrays["bias"] = normal(1, N, 1, S)
            case "mask":
                arrays["mask"] = rng.random((BATCH, 1, T, S)) < 0.7
                arrays["mask"][1, 0, 5] = False
            case "head_mask":
                arrays["mask"] = rng.random((1, N, 1, S)) < 0.5
                arrays["mask"][0, 1] = False
            case "query_seq_lengths":
                arrays[name] = np.array([T, T // 3], np.int32)
            case "key_value_seq_lengths":
                arrays[name] = np.array([0, S // 2 + 1], np.int32)
            case "segment_ids":
                ids = np.sort(rng.integers(0, 5, (BATCH, T)), axis=1).astype(np.int32)
                arrays["segment_ids"] = (ids, ids)
            case "two_segment_ids":
                of_query = np.sort(rng.integers(0, 5, (BATCH, T)), axis=1).astype(np.int32)
                arrays["segment_ids"] = (of_query, np.sort(rng.integers(2, 7, (BATCH, S)), axis=1).astype(np.int32))
    return arrays


def as_arguments(arrays):
    """For `flash_attention`: where both lengths are equal, one array of segments serves."""
    given = jax.tree.map(jnp.asarray, arrays)
    if "segment_ids" in given and given["segment_ids"][0].shape == given["segment_ids"][1].shape:
        given["segment_ids"] = given["segment_ids"][0]
    return given


def run_case(case, arrays, implementation=None):
    options: Any = {**case.options, "implementation": implementation}
    return jax.jit(lambda arrays: flash_attention(**arrays, **options, return_residual=True))(as_arguments(arrays))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_residual_are_the_formulas(case):
    arrays = make(case)
    out, residual = run_case(case, arrays)
    assert (out.dtype, residual.dtype) == (jnp.float32, jnp.float32)
    ref, low = (softmax_attention(arrays, dtype, **case.options) for dtype in (np.float64, np.float32))
    assert_as_exact(out, ref[0], low[0], np.float32, name="output")
    assert_as_exact(residual, ref[1], low[1], np.float32, name="residual")


def test_some_cases_have_rows_that_see_nothing_and_some_have_none():
    """Guards the cases above: zeros and -inf are among what they expect."""
    is_blind = [np.isinf(softmax_attention(make(case), np.float64, **case.options)[1]) for case in CASES]
    assert sum(blind.any() for blind in is_blind) >= 5
    assert sum(not blind.any() for blind in is_blind) >= 5


# One of each kind; what is differentiated is compiled anew.
@pytest.mark.parametrize("case", [CASES[i] for i in (1, 6, 7, 9, 11, 12, 13, 15)], ids=str)
def test_gradients_are_the_formulas(case):
    arrays = make(case)
    rng = np.random.default_rng(1)
    d_out = rng.standard_normal(arrays["query"].shape).astype(np.float32)
    d_residual = rng.standard_normal(arrays["query"].shape[:3]).astype(np.float32)
    names = [name for name in ("query", "key", "value", "bias") if name in arrays]

    @jax.jit
    def pull_back(arrays):
        def forward(wanted):
            return flash_attention(**(arrays | wanted), **case.options, return_residual=True)

        return jax.vjp(forward, {name: arrays[name] for name in names})[1]((d_out, d_residual))[0]

    found = pull_back(as_arguments(arrays))
    ref, low = (gradients(arrays, d_out, d_residual, dtype, **case.options) for dtype in (np.float64, np.float32))
    assert found.keys() == ref.keys()
    for name in names:
        assert_as_exact(found[name], ref[name], low[name], np.float32, factor=3.0, name=name)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("case", [CASES[i] for i in (3, 5, 7, 11)], ids=str)
def test_bfloat16_is_as_good_as_the_plain_formula_in_it(case, implementation):
    arrays = make(case, BFLOAT16)
    out, residual = run_case(case, arrays, implementation)
    assert (out.dtype, residual.dtype) == (jnp.bfloat16, jnp.float32)
    ref, low = (softmax_attention(arrays, dtype, **case.options) for dtype in (np.float64, BFLOAT16))
    assert_as_exact(out, ref[0], low[0], BFLOAT16, name="output")
    assert_as_exact(residual, ref[1], low[1], BFLOAT16, name="residual")


def test_the_reference_multiplies_bfloat16_in_float32():
    """It differs from the exact result by the rounding of the output alone."""
    case = CASES[3]
    arrays = make(case, BFLOAT16)
    ref = softmax_attention(arrays, np.float64)[0]
    out = np.asarray(run_case(case, arrays, "reference")[0]).astype(np.float64)
    np.testing.assert_allclose(out, ref, rtol=2**-8, atol=1e-5)


def test_the_same_input_gives_the_same_bits():
    case = CASES[11]
    arrays = make(case)
    for first, second in zip(run_case(case, arrays), run_case(case, arrays), strict=True):
        np.testing.assert_array_equal(first, second)


def test_rows_that_see_nothing_give_zeros_and_no_gradient():
    case = Case(9, 5)
    arrays = as_arguments(make(case))
    arrays["mask"] = jnp.zeros((BATCH, 1, 9, 5), bool).at[0, 0, 3].set(True)
    arrays["bias"] = jnp.ones((BATCH, 4, 9, 5))

    @jax.jit
    def run(arrays):
        wanted = {name: arrays[name] for name in ("query", "key", "value", "bias")}
        results, pull_back = jax.vjp(
            lambda wanted: flash_attention(**wanted, mask=arrays["mask"], return_residual=True), wanted
        )
        return results, pull_back(jax.tree.map(jnp.ones_like, results))[0]

    (out, residual), found = run(arrays)
    sees = np.zeros((BATCH, 9), bool)
    sees[0, 3] = True
    assert not np.asarray(out)[~sees].any()
    assert np.asarray(out)[sees].all()
    assert (np.asarray(residual)[~sees] == -np.inf).all()
    assert np.isfinite(np.asarray(residual)[sees]).all()
    for name, gradient in found.items():
        assert np.isfinite(np.asarray(gradient)).all(), name
    assert not np.asarray(found["query"])[~sees].any()
    assert np.asarray(found["query"])[sees].all()
    # The second of the batch sees nothing at all.
    for name in ("key", "value"):
        assert not np.asarray(found[name])[1].any()
        assert np.asarray(found[name])[0].any()


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ((), {}),
        (("bias",), {"is_causal": True}),
        (("mask",), {"scale": 0.3}),
        (("row_bias", "head_mask"), {}),
        ((), {"local_window_size": 4}),
        ((), {"local_window_size": (6, 2), "is_causal": True}),
        (("lengths",), {}),
    ],
)
def test_it_stands_in_for_jax_nn(data, options):
    """Where both have an option; rows that see nothing are another matter there, and left out."""
    case = Case(33, 33, data=tuple(name for name in data if name != "lengths"), options=options)
    arrays = make(case)
    sees = np.ones((BATCH, 33, 4), bool)
    if "lengths" in data:
        arrays |= {
            "query_seq_lengths": np.array([33, 20], np.int32),
            "key_value_seq_lengths": np.array([7, 33], np.int32),
        }
        sees[1, 20:] = False
    elif "mask" in arrays:
        visible = np.broadcast_to(arrays["mask"].any(-1), (BATCH, 4, 33))
        sees = np.moveaxis(visible, 1, 2)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        expected = jax.jit(partial(jax.nn.dot_product_attention, **options, implementation="xla"))(
            **as_arguments(arrays)
        )
    out = run_case(case, arrays)[0]
    assert sees.any()
    np.testing.assert_allclose(np.asarray(out)[sees], np.asarray(expected)[sees], rtol=2e-5, atol=2e-6)


# Errors.


@pytest.fixture
def no_annotation_checks() -> Iterator[None]:
    """Lets wrong shapes through to the function's own checks, which is what a user without this suite meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def array(*shape, dtype: Any = np.float32):
    return jnp.zeros(shape, dtype)


@pytest.mark.usefixtures("no_annotation_checks")
@pytest.mark.parametrize(
    ("change", "expected", "actual"),
    [
        ({"query": array(5, 4, 8)}, "query .*[batch, length, heads, head_dim]", "(5, 4, 8)"),
        ({"value": array(2, 7, 16)}, "value .*[batch, length, heads, head_dim]", "(2, 7, 16)"),
        ({"key": array(2, 7, 2, 8, dtype=jnp.bfloat16)}, "key .*float32", "bfloat16"),
        ({"value": array(2, 7, 2, 8, dtype=jnp.int32)}, "value .*float32", "int32"),
        ({"key": array(3, 7, 2, 8)}, "key and value .*[2, kv_len, kv_heads, 8]", "(3, 7, 2, 8)"),
        ({"key": array(2, 7, 2, 9)}, "key and value .*[2, kv_len, kv_heads, 8]", "(2, 7, 2, 9)"),
        ({"value": array(2, 6, 2, 8)}, "key and value", "(2, 7, 2, 8) and (2, 6, 2, 8)"),
        ({"key": array(2, 7, 3, 8), "value": array(2, 7, 3, 8)}, "query heads .*multiple of the 3 kv heads", "4"),
        ({"bias": array(2, 4, 5, 6)}, "bias .*(2, 4, 5, 7)", "(2, 4, 5, 6)"),
        ({"bias": array(5, 7)}, "bias .*(2, 4, 5, 7)", "(5, 7)"),
        ({"mask": array(2, 3, 5, 7, dtype=bool)}, "mask .*(2, 4, 5, 7)", "(2, 3, 5, 7)"),
        ({"mask": array(2, 4, 5, 7)}, "mask .*bool", "float32"),
        ({"segment_ids": array(2, 5, dtype=np.int32)}, "segment_ids .*q_len == kv_len", "5 and 7"),
        ({"logits_soft_cap": 0.0}, "logits_soft_cap .*positive", "0.0"),
        ({"logits_soft_cap": float("nan")}, "logits_soft_cap .*positive", "nan"),
        ({"local_window_size": -1}, "local_window_size .*negative", "-1"),
        ({"local_window_size": (3, -2)}, "local_window_size .*negative", "(3, -2)"),
        ({"implementation": "cuda"}, "implementation .*'xla', 'reference' or None", "'cuda'"),
        # What has a length or a kind of its own.
        ({"query": array(2, 5, 4, 8, dtype=np.int32), "key": array(2, 7, 2, 8, dtype=np.int32),
              "value": array(2, 7, 2, 8, dtype=np.int32)}, "query .*float", "int32"),
        ({"query_seq_lengths": array(3, dtype=np.int32)}, "query_seq_lengths .*(2,)", "(3,)"),
        ({"key_value_seq_lengths": array(2, 1, dtype=np.int32)}, "key_value_seq_lengths .*(2,)", "(2, 1)"),
        ({"segment_ids": (array(2, 5, dtype=np.int32),) * 2}, "segment_ids .*(2, 7)", "(2, 5)"),
        ({"local_window_size": (1, 2, 3)}, "local_window_size", "(1, 2, 3)"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_with_expected_and_actual(change, expected, actual):
    arguments: dict[str, Any] = {
        "query": array(2, 5, 4, 8),
        "key": array(2, 7, 2, 8),
        "value": array(2, 7, 2, 8),
    } | change
    pattern = ".*".join(re.escape(part) for part in expected.split(".*")) + f".*got .*{re.escape(actual)}"
    with pytest.raises((ValueError, TypeError), match=pattern) as caught:
        flash_attention(**arguments)
    assert "\n" not in str(caught.value)


def test_a_row_that_bias_hides_gives_zeros():
    query = key = value = jnp.ones((1, 3, 1, 8))
    bias = jnp.zeros((1, 1, 3, 3)).at[0, 0, 1].set(-jnp.inf)
    out, residual = flash_attention(query, key, value, bias, return_residual=True)
    np.testing.assert_allclose(out[0, :, 0, 0], [1, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(residual[0, :, 0], [8**0.5 + np.log(3), -np.inf, 8**0.5 + np.log(3)], rtol=1e-6)
