"""The tables of tile sizes that ship with the kernels."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pallas_kernels import tuned_tables
from pallas_kernels.gpu import GPUS
from pallas_kernels.tuned_tables import FOLDER, tuned

FILES = sorted(path.name for path in FOLDER.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_a_gpus_and_has_a_row_for_every_head_dim(name):
    content = json.loads((FOLDER / name).read_text())
    assert content.pop("device") == GPUS[name.removesuffix(".json")].device_kind
    assert content.pop("jax")
    assert set(content) == {"flash_forward", "flash_backward", "flash_backward_packed", "paged_decode"}
    for kernel, rows in content.items():
        head_dims = [row["head_dim"] for row in rows]
        assert head_dims == sorted(set(head_dims))
        assert head_dims[-1] == (128 if kernel.startswith("flash_backward") else 256)  # above, it is no fused launch
        assert len({tuple(row) for row in rows}) == 1


def test_a_row_serves_the_head_dims_up_to_its_own():
    first, last = json.loads((FOLDER / "h100.json").read_text())["flash_forward"]
    for head_dim in (64, first["head_dim"]):
        assert tuned("flash_forward", head_dim) | {"head_dim": first["head_dim"]} == first
    for head_dim in (first["head_dim"] + 64, 256):
        assert tuned("flash_forward", head_dim) | {"head_dim": last["head_dim"]} == last


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In the place of the one that ships, and like it."""
    (tmp_path / "h100.json").write_text((FOLDER / "h100.json").read_text())
    monkeypatch.setattr(tuned_tables, "FOLDER", tmp_path)
    tuned_tables._tables.cache_clear()
    yield tmp_path
    tuned_tables._tables.cache_clear()


def test_each_gpu_has_its_own_and_those_that_were_not_measured_the_h100s(folder, monkeypatch):
    own = {"paged_decode": [{"head_dim": 256, "chunk": 64}]}
    (folder / "h200.json").write_text(json.dumps(own))

    def chunk_on(kind):
        monkeypatch.setattr(tuned_tables, "platform_and_kind", lambda: ("gpu", kind))
        return tuned("paged_decode", 64)["chunk"]

    (row,) = json.loads((folder / "h100.json").read_text())["paged_decode"]
    assert chunk_on("NVIDIA H200") == 64
    for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA B200", "cpu"):
        assert chunk_on(kind) == row["chunk"] != 64
