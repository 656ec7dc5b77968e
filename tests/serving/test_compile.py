"""`jpaged compile` where nothing can compile; what it prints otherwise is tested in tests/aot."""

from collections.abc import Callable
from typing import Any

import pytest
from jax.experimental import topologies
from typer.testing import CliRunner

from serving.cli import app
from serving.kernel_list import Shape, flash_entries, kernel_list


def test_without_the_cuda_plugin(monkeypatch: pytest.MonkeyPatch):
    def no_plugin(**_: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(topologies, "get_topology_desc", no_plugin)
    result = CliRunner(env={"JAX_PLATFORMS": "cpu"}).invoke(app, ["compile", "gpt-2"])
    assert result.exit_code == 1
    assert result.stderr.startswith("jpaged: error: no CUDA plugin to compile with: expected the extra `aot`")


@pytest.mark.parametrize(
    ("name", "visible"),
    [
        ("full", lambda i, j: True),
        ("causal", lambda i, j: j <= i),
        ("window", lambda i, j: i - 128 <= j <= i),  # a quarter of the length
        ("block-mask", lambda i, j: (i // 128 ^ j // 128).bit_count() <= 1),  # butterfly
    ],
)
def test_flops_are_those_of_the_pairs_that_are_visible(name: str, visible: Callable[[int, int], bool]):
    shape = Shape("short", B=2, length=512, N=4, K=2, H=64)
    forward, backward = flash_entries(shape, name)
    pairs = sum(visible(i, j) for i in range(512) for j in range(512))
    assert forward.flops == 2 * 4 * pairs * (2 * 64 + 2 * 64)  # Q K^T and P V, a multiplication and an addition each
    assert backward.flops == 2 * 4 * pairs * 5 * 2 * 64


def test_names_are_unique():
    names = [entry.name for entry in kernel_list()]
    assert len(set(names)) == len(names)
