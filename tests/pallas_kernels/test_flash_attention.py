"""flash_attention against the formulas, by every implementation that runs on a CPU, and its transformations."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import (
    BATCH,
    BFLOAT16,
    DROPOUT,
    Case,
    as_arguments,
    assert_as_exact,
    gradients,
    make,
    options_of,
    softmax_attention,
)

from pallas_kernels import BlockMask, explain, flash_attention

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
    Case(113, 203, N=2, data=("dropout",)),
    Case(77, 77, data=("dropout", "segment_ids", "bias"), options={"is_causal": True}),
    Case(100, 70, data=("block_mask",)),
    Case(100, 70, data=("head_block_mask", "dropout"), options={"is_causal": True, "logits_soft_cap": 5.0}),
]


def run_case(case, arrays, implementation=None):
    options = options_of(case, implementation)
    return jax.jit(lambda arrays: flash_attention(**arrays, **options, return_residual=True))(as_arguments(arrays))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_residual_are_the_formulas(case, implementation):
    arrays = make(case)
    out, residual = run_case(case, arrays, implementation)
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
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("case", [CASES[i] for i in (1, 6, 7, 9, 11, 12, 13, 15, 17, 19)], ids=str)
def test_gradients_are_the_formulas(case, implementation):
    arrays = make(case)
    rng = np.random.default_rng(1)
    d_out = rng.standard_normal(arrays["query"].shape).astype(np.float32)
    d_residual = rng.standard_normal(arrays["query"].shape[:3]).astype(np.float32)
    names = [name for name in ("query", "key", "value", "bias") if name in arrays]

    @jax.jit
    def pull_back(arrays):
        def forward(wanted):
            return flash_attention(**(arrays | wanted), **options_of(case, implementation), return_residual=True)

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


def array(*shape, dtype: Any = np.float32):
    return jnp.zeros(shape, dtype)


@pytest.mark.usefixtures("no_annotation_checks")
@pytest.mark.parametrize(
    ("change", "expected", "actual"),
    [
        ({"query": array(4, 8)}, "query .*[batch, length, heads, head_dim]", "(4, 8)"),
        ({"query": 3.0}, "query .*array", "float"),
        ({"value": array(7, 16)}, "value .*[batch, length, heads, head_dim]", "(7, 16)"),
        ({"key": array(2, 7, 2, 8, dtype=jnp.bfloat16)}, "key .*float32", "bfloat16"),
        ({"value": array(2, 7, 2, 8, dtype=jnp.int32)}, "value .*floating", "int32"),
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
        ({"implementation": "cuda"}, "implementation .*'xla', 'reference'.*None", "'cuda'"),
        # What has a length or a kind of its own.
        ({"query": array(2, 5, 4, 8, dtype=np.int32), "key": array(2, 7, 2, 8, dtype=np.int32),
              "value": array(2, 7, 2, 8, dtype=np.int32)}, "query .*float", "int32"),
        ({"query_seq_lengths": array(3, dtype=np.int32)}, "query_seq_lengths .*(2,)", "(3,)"),
        ({"key_value_seq_lengths": array(2, 1, dtype=np.int32)}, "key_value_seq_lengths .*(2,)", "(2, 1)"),
        ({"segment_ids": (array(2, 5, dtype=np.int32),) * 2}, "segment_ids .*(2, 7)", "(2, 5)"),
        ({"local_window_size": (1, 2, 3)}, "local_window_size", "(1, 2, 3)"),
        ({"local_window_size": 2.5}, "local_window_size .*int", "2.5"),
        ({"bias": array(2, 4, 5, 7, dtype=np.int32)}, "bias .*floating", "int32"),
        ({"query_seq_lengths": array(2)}, "query_seq_lengths .*int32", "float32"),
        ({"segment_ids": (array(2, 5, dtype=np.int32),) * 3}, "segment_ids", "3"),
        ({"scale": "large"}, "scale .*number", "str"),
        ({"scale": float("inf")}, "scale .*finite", "inf"),
        ({"is_causal": 1}, "is_causal .*bool", "int"),
        ({"query_offset": 1.5}, "query_offset .*int", "float"),
        ({"logits_soft_cap": "hard"}, "logits_soft_cap .*number", "str"),
        ({"block_mask": np.ones((1, 1), bool)}, "block_mask .*BlockMask", "ndarray"),
        ({"block_mask": BlockMask(np.ones((2, 2), bool), 4, 2)}, "block_mask .*(2, 4) or (4, 2, 4)", "(2, 2)"),
        ({"dropout_rate": 1.0}, "dropout_rate .*below 1", "1.0"),
        ({"dropout_rate": None}, "dropout_rate .*number", "NoneType"),
        ({"dropout_rate": 0.5}, "dropout_rng", "None"),
        ({"dropout_rate": 0.5, "dropout_rng": 3}, "dropout_rng .*key", "int"),
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


def test_what_no_backend_here_can_do_is_said():
    query = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(NotImplementedError, match=r"mosaic cannot serve: .*Hopper.*cpu"):
        flash_attention(query, query, query, implementation="mosaic")
    with pytest.raises(NotImplementedError, match=r"cudnn cannot serve: .*NVIDIA GPUs.*cpu"):
        flash_attention(query, query, query, implementation="cudnn")


def test_explain_says_who_serves_and_why_others_do_not():
    query = jnp.zeros((1, 4, 2, 8))
    found = explain(query, query, query, is_causal=True)
    assert found.implementation == "xla"
    assert set(found.reasons) == {"mosaic", "cudnn"}
    assert str(found).endswith("xla serves")
    assert explain(query, query, query, implementation="mosaic").implementation is None
    with pytest.raises(ValueError, match="query heads"):
        explain(query, jnp.zeros((1, 4, 3, 8)), jnp.zeros((1, 4, 3, 8)))
    with pytest.raises(TypeError, match="got causal"):
        explain(query, query, query, causal=True)  # pyright: ignore[reportCallIssue]


# Transformations.

PACKED = Case(33, 65, data=("bias", "dropout"), options={"is_causal": True, "query_offset": 32})


def loss_of(case, arrays):
    """A loss that output and residual enter, as a function of the arrays with a gradient."""

    def loss(wanted):
        out, residual = flash_attention(**(arrays | wanted), **options_of(case, "xla"), return_residual=True)
        return (out.astype(jnp.float32) ** 2).sum() + jnp.where(jnp.isfinite(residual), residual, 0).sum()

    return loss


def differentiable(arrays):
    return {name: arrays[name] for name in ("query", "key", "value", "bias") if name in arrays}


@pytest.mark.parametrize("mapped", [("query", "key", "value", "bias"), ("query",), ("value", "bias")], ids="+".join)
def test_vmap_is_one_call_after_the_other(mapped):
    examples = [as_arguments(make(PACKED._replace(T=33, S=65), np.float32)) for _ in range(3)]
    rng = np.random.default_rng(3)
    examples = [{k: v + jnp.float32(rng.normal()) * v for k, v in e.items()} for e in examples]
    fixed = {name: x for name, x in examples[0].items() if name not in mapped}
    stacked = {name: jnp.stack([e[name] for e in examples]) for name in mapped}

    def gradient(wanted):
        return jax.grad(loss_of(PACKED, {}))(fixed | wanted)

    together = jax.jit(jax.vmap(gradient))(stacked)
    gradient = jax.jit(gradient)
    for i, example in enumerate(examples):
        alone = gradient({name: example[name] for name in mapped})
        for name in alone:
            np.testing.assert_allclose(together[name][i], alone[name], rtol=2e-4, atol=2e-5, err_msg=name)


def test_vmap_over_masks_of_blocks():
    arrays = as_arguments(make(Case(100, 70)))
    masks = np.random.default_rng(0).random((3, 7, 3)) < 0.5

    def attend(mask):
        return flash_attention(**arrays, block_mask=BlockMask(mask, 16, 32))

    together = jax.vmap(attend)(jnp.asarray(masks))
    for mask, out in zip(masks, together, strict=True):
        np.testing.assert_allclose(out, attend(jnp.asarray(mask)), atol=1e-6)


@pytest.mark.parametrize("saved", [True, False])
def test_checkpoint_runs_no_forward_twice_where_the_named_residuals_are_saved(saved):
    arrays = as_arguments(make(PACKED))
    names = ("flash_attention_out", "flash_attention_lse") if saved else ()
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    checkpointed = jax.checkpoint(loss_of(PACKED, arrays), policy=policy)
    wanted = differentiable(arrays)
    plain = jax.jit(jax.grad(loss_of(PACKED, arrays)))(wanted)
    found = jax.jit(jax.grad(checkpointed))(wanted)
    for name in plain:
        np.testing.assert_allclose(found[name], plain[name], rtol=1e-5, atol=1e-6, err_msg=name)
    calls = str(jax.make_jaxpr(jax.grad(checkpointed))(wanted)).count("custom_vmap_call[")
    assert calls == (2 if saved else 3)  # forward and backward; else one forward more


def test_shard_map_over_batch_and_heads():
    case = Case(33, 65, N=4, K=2, options={"is_causal": True})
    arrays = as_arguments(make(case))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    expected = jax.grad(loss_of(case, {}))(arrays)
    for spec in (jax.P("x"), jax.P(None, None, "x")):
        sharded = jax.jit(
            jax.shard_map(
                lambda a: jax.lax.psum(loss_of(case, {})(a), "x"), mesh=mesh, in_specs=(spec,), out_specs=jax.P()
            )
        )
        found = jax.grad(sharded)(arrays)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_shard_map_over_queries_alone_sums_the_gradients_of_what_they_share():
    arrays = as_arguments(make(Case(34, 65, data=("row_bias", "key_value_seq_lengths"))))
    lengths = arrays.pop("key_value_seq_lengths")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(arrays):
        return loss_of(Case(34, 65), {})(arrays | {"key_value_seq_lengths": lengths})

    in_specs = ({name: jax.P(None, "x") if name == "query" else jax.P() for name in arrays},)
    sharded = jax.shard_map(lambda a: jax.lax.psum(loss(a), "x"), mesh=mesh, in_specs=in_specs, out_specs=jax.P())
    expected, found = jax.grad(loss)(arrays), jax.grad(jax.jit(sharded))(arrays)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_dropout_keeps_the_fraction_and_another_key_another_mask(implementation):
    query = jnp.zeros((2, 256, 2, 8))
    value = jnp.ones((2, 256, 2, 8))

    @jax.jit
    def kept(key):
        return flash_attention(query, query, value, **DROPOUT | {"dropout_rng": key}, implementation=implementation)

    one, two = kept(jax.random.key(1)), kept(jax.random.key(2))
    assert abs(one.mean() * 0.83 - 0.83) < 0.01
    assert abs(two.mean() * 0.83 - 0.83) < 0.01
    assert abs(np.corrcoef(one[..., 0].ravel(), two[..., 0].ravel())[0, 1]) < 0.15
    np.testing.assert_array_equal(one, kept(jax.random.key(1)))
