"""`benchmarks/gpu.py` at the small size that it has on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
