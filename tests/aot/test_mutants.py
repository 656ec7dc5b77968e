"""Deliberate bugs, to which Pallas' interpreter is blind, are seen in the machine code."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import BlockMask, aot, flash_attention, flash_attention_mosaic
from pallas_kernels.flash_forward_config import ForwardConfig

QUERY = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16)


@pytest.fixture(autouse=True)
def traced_anew() -> Iterator[None]:
    """No mutant is found in a cache, nor left in one."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def forward(query, **options):
    return flash_attention(query, query, query, is_causal=True, implementation="mosaic", **options)


def forward_and_backward(query):
    """In three kernels: block masks have no fused backward, of which another warpgroup does the stores."""
    options = {"block_mask": BlockMask.butterfly(512, 512)}
    return jax.grad(lambda query: forward(query, **options).astype(jnp.float32).sum())(query)


LEFT_OUT = {
    "wgmma_wait": "wgmma groups unfinished",  # a slot is freed that wgmma still reads
    "commit_smem": "no fence",  # TMA may store what was there before
    "wait_smem_to_gmem": "no wait between a TMA store and the end",
}


def test_without_a_bug_nothing_is_found():
    report = aot.compile(forward_and_backward, QUERY)
    assert len(report.kernels) == 3
    assert report.faults() == []


@pytest.mark.parametrize(("name", "finding"), LEFT_OUT.items(), ids=LEFT_OUT)
def test_what_is_left_out_is_found_in_each_kernel(monkeypatch: pytest.MonkeyPatch, name: str, finding: str):
    monkeypatch.setattr(plgpu, name, lambda *_: None)
    report = aot.compile(forward_and_backward, QUERY)
    assert len(report.kernels) == 3
    for kernel in report.kernels:
        assert any(finding in fault for fault in kernel.faults()), kernel


def test_tiles_too_large_are_found(monkeypatch: pytest.MonkeyPatch):
    # 96 registers a thread for the scores, 32 for the output, of 160.
    config = ForwardConfig(keys=192, warpgroups=3, stages=2)
    monkeypatch.setattr(flash_attention_mosaic, "default_config", lambda *_: config)
    (kernel,) = aot.compile(forward, QUERY).kernels
    assert kernel.spill_stores > 0
    assert any("spill stores" in fault for fault in kernel.faults())
