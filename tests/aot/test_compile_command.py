"""`jpaged compile`."""

import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner, Result

from serving import compile as compile_module
from serving.cli import app
from serving.kernel_list import Entry


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["compile", *arguments])


def broken() -> tuple[Callable, tuple]:
    raise NotImplementedError("not for this GPU\nand more")


def product() -> tuple[Callable, tuple]:
    return lambda x: x @ x, (jax.ShapeDtypeStruct((256, 256), jnp.bfloat16),)


def test_a_table():
    result = run("flash-forward", "gpt-2", "--inner-loop")
    assert result.exit_code == 0, result.stderr
    assert "Compiled for NVIDIA H100 80GB HBM3" in result.stdout
    (row,) = [line for line in result.stdout.splitlines() if "flash-forward gpt-2 causal" in line and "memory" in line]
    # 4 * 64 FLOP for each of 8 * 12 * 1024 * 1025 / 2 pairs; q, k, v and o of 12.6 MB each, at 3.35 TB/s.
    assert [cell.strip() for cell in row.strip("│").split("│")][-4:] == ["12.9", "50.3", "memory", "15.0"]
    assert "bound TFLOP/s" in result.stdout


def test_json_lines_and_nothing_else():
    result = run("copy-blocks", "decode", "--json", "--gpu", "h200")
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    record = json.loads(line)
    assert record["gpu"] == "h200"
    assert record["faults"] == []
    # 4 pairs of 32 layers' keys and values, 16 * 8 * 128 elements each, read and written; at 4.8 TB/s.
    assert record["bytes"] == 4 * 32 * 2 * 16 * 8 * 128 * 2 * 2
    assert record["seconds"] == pytest.approx(record["bytes"] / 4.8e12)
    (kernel,) = record["kernels"]
    assert (kernel["name"], kernel["spill_stores"], kernel["warpgroups"], kernel["hgmma"]) == ("copy_blocks", 0, 1, 0)
    assert (kernel["tma_loads"], kernel["tma_stores"]) == (2, 2)  # keys and values


def test_what_fails_is_named_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch):
    entries = [Entry("first", broken, 1.0), Entry("second", product, 2.0 * 256**3)]
    monkeypatch.setattr(compile_module, "kernel_list", lambda: entries)
    result = run("--json")
    assert result.exit_code == 1
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["faults"] == ["NotImplementedError: not for this GPU"]
    assert first["kernels"] == []
    assert (second["faults"], second["bound"], second["bytes"]) == ([], "memory", 2 * 256 * 256 * 2)
    assert "first: NotImplementedError: not for this GPU" in result.stderr


def test_words_that_name_nothing():
    result = run("flash-forward", "head-63")
    assert result.exit_code == 1
    assert "got flash-forward head-63" in result.stderr


def test_an_unknown_gpu():
    result = run("copy-blocks", "--gpu", "a100")
    assert result.exit_code == 1
    assert "gpu: expected one of h100, h200, b200, got 'a100'" in result.stderr
