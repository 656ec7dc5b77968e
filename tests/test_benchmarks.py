"""`benchmarks/gpu.py` at the small size that it has on a CPU, and what `benchmarks/tune.py` makes of its times."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


def test_every_part_prints_and_saves_its_figures(tmp_path: Path):
    result = run(tmp_path)
    assert result.returncode == 0, result.stderr
    tables = {}
    for path in tmp_path.iterdir():
        tables[path.stem] = {
            name: rows for name, rows in json.loads(path.read_text()).items() if isinstance(rows, list)
        }
    assert {part: set(found) for part, found in tables.items()} == {
        "decode": {"decode", "blocks", "prefill"},
        "attention": {"attention"},
        "engine": {"engine", "host"},
        "cache_ops": {"copy", "write", "rotate and write", "swap"},
    }
    rows = [row for part in tables.values() for table in part.values() for row in table]
    numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert min(numbers) > 0
    assert sum(": " in line and not line.startswith("---") for line in result.stdout.splitlines()) == len(rows)


def test_a_part_that_runs_out_of_time_is_named(tmp_path: Path):
    result = run(tmp_path, "--parts", "engine", "--seconds", 4)
    assert result.returncode == 1
    assert result.stderr == "engine was cut off\n"


def test_an_unknown_part(tmp_path: Path):
    result = run(tmp_path / "new", "--parts", "decode,encode")
    assert result.returncode == 2
    assert "got encode" in result.stderr
    assert not (tmp_path / "new").exists()


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("tune")


def test_the_fastest_is_that_of_the_least_geometric_mean_over_all_problems(tune):
    rows = [{"keys": 64}, {"keys": 128}, {"keys": 192}]
    times = {(0, "a"): 1.0, (0, "b"): 9.0, (1, "a"): 2.0, (1, "b"): 4.0, (2, "a"): 0.1}
    assert tune.fastest(rows, times) == {"keys": 128}


def test_tables_are_written_as_those_that_ship(tune):
    shipped = (ROOT / "pallas_kernels" / "tuned" / "h100.json").read_text()
    assert tune.written(json.loads(shipped)) == shipped


def test_tuning_needs_a_hopper_gpu(tune, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["tune.py", str(tmp_path / "h100.json")])
    with pytest.raises(SystemExit, match="expected a Hopper GPU to measure, got cpu"):
        tune.main()
    assert not any(tmp_path.iterdir())
