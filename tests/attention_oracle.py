"""Dense attention and its gradients by the formulas, written out in NumPy, and the rule to judge by them.

The rule, for the formula in float64 (ref) and in the kernel's own dtype (low): max|out - ref| is at most twice
max|low - ref| plus what adding and subtracting 0.3 costs in that dtype; three times for gradients.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import BlockMask, dropout

BFLOAT16 = ml_dtypes.bfloat16
BATCH = 2
DROPOUT = {"dropout_rate": 0.17, "dropout_rng": jax.random.key(7)}


def softmax_attention(arrays, dtype, *, scale=None, logits_soft_cap=None, **visibility):
    """Output and log-sum-exp, and what the backward pass needs; every result is rounded to dtype."""

    def rounded(x):
        return x.astype(dtype).astype(x.dtype)

    work = np.float64 if dtype == np.float64 else np.float32
    q, k, v = (arrays[name].astype(work) for name in ("query", "key", "value"))
    repeats = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, repeats, axis=2), np.repeat(v, repeats, axis=2)
    scale = work(q.shape[-1] ** -0.5 if scale is None else scale)
    logits = rounded(rounded(scores(q, k)) * scale)
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
    out = rounded(weighted(rounded(probs * arrays.get("dropout", 1)), v))
    return out, np.moveaxis(residual[..., 0], 1, 2), (q, k, v, scale, slope, probs, rounded)


def scores(x, y):
    """[B, T, N, H] and [B, S, N, H] to [B, N, T, S]; by BLAS, which sums in the order that matmuls have everywhere."""
    return np.moveaxis(x, 1, 2) @ np.moveaxis(y, 1, 3)


def weighted(weights, x):
    """[B, N, T, S] and [B, S, N, H] to [B, T, N, H]."""
    return np.moveaxis(weights.astype(x.dtype) @ np.moveaxis(x, 1, 2), 1, 2)


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
    if "block_mask" in arrays:
        blocks = arrays["block_mask"]
        visible = visible & np.asarray(blocks.mask)[..., row // blocks.block_q, key // blocks.block_kv]
    return visible & arrays.get("mask", True)


def gradients(arrays, d_out, d_residual, dtype, **options):
    """d query, d key, d value and d bias by hand: section 3.1 of arXiv 2307.08691, and d residual beside it."""
    q, k, v, scale, slope, probs, rounded = softmax_attention(arrays, dtype, **options)[2]
    work = q.dtype
    d_out, d_residual = d_out.astype(work), d_residual.astype(work)
    dropout = arrays.get("dropout", 1)
    d_probs = rounded(scores(d_out, v) * dropout)
    rows = (probs * d_probs).sum(-1, keepdims=True) - np.moveaxis(d_residual, 2, 1)[..., None]
    d_bias = rounded(probs * (d_probs - rows))
    d_logits = rounded(d_bias * slope * scale)
    K = arrays["key"].shape[2]

    def grouped(x):
        return x.reshape(*x.shape[:2], K, -1, x.shape[-1]).sum(3)

    found = {
        "query": weighted(d_logits, k),
        "key": grouped(weighted(np.swapaxes(d_logits, 2, 3), q)),
        "value": grouped(weighted(np.swapaxes(probs * dropout, 2, 3), d_out)),
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
            case "block_mask":
                arrays["block_mask"] = BlockMask(rng.random((-(-T // 16), -(-S // 32))) < 0.5, 16, 32)
            case "head_block_mask":
                arrays["block_mask"] = BlockMask(rng.random((N, -(-T // 16), -(-S // 32))) < 0.5, 16, 32)
            case "wide_block_mask":
                arrays["block_mask"] = BlockMask(rng.random((-(-T // 256), -(-S // 128))) < 0.5, 256, 128)
            case "wide_head_block_mask":
                arrays["block_mask"] = BlockMask(rng.random((N, -(-T // 192), -(-S // 384))) < 0.5, 192, 384)
            case "dropout":
                arrays["dropout"] = dropout_factors(N, T, S)
    return arrays


def dropout_factors(N, T, S):
    """What dropout multiplies each probability by: 0 or 1 / (1 - rate), [B, N, T, S]."""
    rate = DROPOUT["dropout_rate"]
    seeds = dropout.batch_seeds(DROPOUT["dropout_rng"], BATCH)
    head, row, column = (jnp.arange(n, dtype=jnp.uint32) for n in (N, T, S))
    factors = np.empty((BATCH, N, T, S))
    for b in range(BATCH):
        keys = dropout.row_keys(seeds[b, 0], seeds[b, 1], head[:, None], row[None])
        kept = dropout.keep(keys[0][..., None], keys[1][..., None], column[None, None], rate)
        factors[b] = np.where(kept, 1 / (1 - rate), 0)
    return factors


def as_arguments(arrays):
    """For `flash_attention`: where both lengths are equal, one array of segments serves."""
    given = jax.tree.map(jnp.asarray, {name: x for name, x in arrays.items() if name != "dropout"})
    if "segment_ids" in given and given["segment_ids"][0].shape == given["segment_ids"][1].shape:
        given["segment_ids"] = given["segment_ids"][0]
    return given


def options_of(case, implementation=None) -> Any:
    return {**case.options, **(DROPOUT if "dropout" in case.data else {}), "implementation": implementation}
