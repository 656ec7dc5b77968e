"""Prefixes that decodes share, read once for a group, against the formula in a cache full of NaN (`paged_oracle`)."""

import dataclasses
from functools import partial
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from mosaic_interpreter import caught, interpreted, mutant, without_races
from paged_oracle import LAYER, Step, assert_sequences_exact

from pallas_kernels import paged_attention, paged_decode, write_kv
from pallas_kernels import paged_attention_mosaic as mosaic
from pallas_kernels.paged_decode_config import default_config

# Names of groups, the tokens that they share, and how many sequences they are. "a" and "b" share as much, of others.
GROUPS: dict[str, list[tuple[str, int, int]]] = {
    "one": [("a", 64, 1)],
    "two": [("a", 192, 2)],
    "five": [("a", 160, 5)],
    "several": [("a", 128, 3), ("b", 128, 2), ("c", 32, 2)],
    "with singles": [("-", 0, 1), ("a", 288, 4), ("-", 0, 2), ("b", 32, 2)],
}
OWN = [1, 40, 17, 3, 129, 64, 2, 33, 16, 70]  # tokens of a sequence past its prefix


def step(groups: list[tuple[str, int, int]], **changes: Any) -> Step:
    shared = [(group, prefix) for group, prefix, count in groups for _ in range(count)]
    shape: dict[str, Any] = {
        "rows": 14,
        "tokens": 14,
        "max_context": 480,
        "max_query_len": 1,
        "H": 16,
        "num_blocks": 720,
    }
    shape |= {"num_blocks": 720 * 16 // changes["block_size"]} if "block_size" in changes else {}
    sequences = [(1, prefix + own) for (_, prefix), own in zip(shared, OWN * 2, strict=False)]
    return Step(sequences, shared=shared, **shape | changes)


@partial(jax.jit, static_argnames=("logits_soft_cap", "local_window_size", "implementation"))
def run(query, cache, batch, key, value, **options):
    cache = write_kv(cache, batch, LAYER, key, value)
    return paged_attention(query, cache, batch, LAYER, **options)


@pytest.mark.parametrize("options", [{}, {"left": 100, "logits_soft_cap": 5.0}, {"left": 0}])
@pytest.mark.parametrize("groups", GROUPS)
def test_output_is_the_formula(groups, options):
    problem = step(GROUPS[groups])
    arguments = problem.arguments()
    arguments[2].check(arguments[1])
    given = {name: value for name, value in options.items() if name != "left"}
    window = {"local_window_size": (options["left"], 0)} if "left" in options else {}
    for implementation in ("xla", "reference"):
        out = run(*arguments, **given, **window, implementation=implementation)
        assert_sequences_exact(problem, out, name=implementation, **options)


@pytest.mark.parametrize("changes", [{"block_size": 32, "N": 6, "K": 3}, {"N": 4, "K": 1, "dtype": ml_dtypes.bfloat16}])
def test_block_sizes_heads_and_dtypes(changes):
    problem = step(GROUPS["with singles"], **changes)
    assert_sequences_exact(problem, run(*problem.arguments(), implementation="xla"))


def test_more_than_take_their_turn_at_once():
    problem = step([("a", 256, 11), ("b", 16, 2)])
    assert_sequences_exact(problem, run(*problem.arguments(), implementation="xla"))


def test_beside_prefills():
    """Which share nothing."""
    sequences = [(1, 70), (1, 90), (1, 20), (9, 80), (30, 30)]
    shared = [("a", 64), ("a", 64), ("-", 0), ("-", 0), ("-", 0)]
    problem = Step(sequences, shared=shared, H=16)
    assert_sequences_exact(problem, run(*problem.arguments(), implementation="xla"))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_bits_do_not_depend_on_the_rest_of_the_group_or_the_batch(dtype):
    problem = step([("a", 256, 11), ("b", 16, 2)], dtype=dtype)
    together = np.asarray(run(*problem.arguments(), implementation="xla"))
    for chosen in ([3, 1, 10, 0], [11, 12, 7, 9], [12, 5, 2, 8, 11], [4], [12]):
        out = np.asarray(run(*problem.arguments(chosen), implementation="xla"))
        np.testing.assert_array_equal(out[: len(chosen)], together[chosen])


def program(step, *, chosen=None, left=None, logits_soft_cap=None):
    """A function of (query, cache, batch) for few thread blocks and small parts, and these."""
    query, cache, batch, key, value = step.arguments(chosen)
    cache = write_kv(cache, batch, LAYER, key, value)
    options = mosaic.Options(query.shape[-1] ** -0.5, logits_soft_cap, left)
    K, group = cache.num_kv_heads, query.shape[1] // cache.num_kv_heads
    configs = [
        dataclasses.replace(default_config(K, queries, cache.head_dim), blocks=2, whole=0, chunk=128, stages=2)
        for queries in (group, paged_decode.MAX_COLUMNS // group * group)
    ]

    def decode(query, cache, batch):
        tables = batch.block_tables + LAYER * cache.num_blocks
        return mosaic.decode(query, cache, batch, tables, options, *configs)[..., : cache.head_dim]

    return decode, query, cache, batch


MOSAIC: dict[str, Any] = {"dtype": ml_dtypes.bfloat16, "H": 64, "rows": 11, "tokens": 11}


@pytest.mark.parametrize(
    ("groups", "changes", "options"),
    [
        ("one", {}, {}),
        ("two", {"N": 2, "K": 2}, {}),
        ("five", {"N": 16, "K": 1, "dtype": np.float16}, {}),
        ("several", {"N": 9, "K": 3}, {"logits_soft_cap": 5.0}),
        ("with singles", {"block_size": 32, "N": 4, "K": 1, "H": 80}, {}),
        ("with singles", {"N": 2, "K": 1}, {"left": 100}),
    ],
)
def test_the_hopper_kernels_output_is_the_formula(groups, changes, options):
    problem = step(GROUPS[groups], **MOSAIC | changes)
    out = without_races(*program(problem, **options))
    assert_sequences_exact(problem, out, **options)


def test_the_hopper_kernels_bits_do_not_depend_on_the_rest_of_the_group():
    """Twelve query heads a kv head: two sequences an item."""
    problem = step([("a", 160, 4), ("b", 32, 2)], N=12, K=1, **MOSAIC)
    together = np.asarray(without_races(*program(problem)))
    for chosen in ([3, 1, 2, 5], [2], [5]):
        out = np.asarray(without_races(*program(problem, chosen=chosen)))
        np.testing.assert_array_equal(out[: len(chosen)], together[chosen])


MUTANTS = {
    "none": ("item.part + member * item.stride", "item.part + member * item.stride"),
    "one part for all": ("item.part + member * item.stride", "item.part"),
    "the first's output for all": ("head * launch.head_columns + member * launch.group", "head * launch.head_columns"),
    "queries of others": ("outer, inner = inner, outer", "pass"),
    "not for the last": ("pl.loop(0, item.members)", "pl.loop(0, item.members - 1)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_caught(monkeypatch, name):
    if name != "none":
        monkeypatch.setattr(mosaic, "paged_decode", mutant(paged_decode, *MUTANTS[name]))
    problem = step([("a", 192, 3)], N=4, K=2, **MOSAIC)
    run = program(problem)
    assert caught(lambda: interpreted(*run), partial(assert_sequences_exact, problem)) == (name != "none")
