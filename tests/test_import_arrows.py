"""Arrows point down only: serving -> jpaged -> models -> pallas_kernels."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("pallas_kernels", "models", "jpaged", "serving")  # from the ground up
SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
HOST_MODULES = tuple(
    f"jpaged.{name}"
    for name in (
        "scheduler",
        "scheduler_output",
        "step_draft",
        "decode_batch",
        "group_blocks",
        "block_manager",
        "block_pool",
        "sequence",
        "sampling_params",
    )
)


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and target of every import in `source`, wherever it stands; relative ones keep their dots."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=None, names=names, level=level):
                yield from ((node.lineno, "." * level + alias.name) for alias in names)
            case ast.ImportFrom(module=str(target), level=level):
                yield node.lineno, "." * level + target
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(target)), *_],
            ):
                yield node.lineno, target


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of `module` (dotted name), one line each; empty when nothing is."""
    floor, *inside = module.split(".")
    depth = len(inside) + is_package  # how many leading dots stay inside the package
    wrong = []
    for line, target in imports(source):
        name = target.lstrip(".")
        top = name.split(".")[0]
        if target != name:
            fault = "leaves its package" if len(target) - len(name) > depth else None
        elif top == floor:
            fault = "is its own package: use a relative import"
        elif top in FLOORS and FLOORS.index(top) > FLOORS.index(floor):
            fault = "stands on a higher floor"
        elif floor == "jpaged" and top == "models" and module != "jpaged.llm":
            fault = "is for jpaged/llm.py only"
        elif module in HOST_MODULES and top in ("jax", "jaxlib", "flax", "pallas_kernels"):
            fault = "is not for host logic"
        else:
            fault = None
        if fault:
            wrong.append(f"{module}:{line}: {target} {fault}")
    return wrong


def run_fresh(code: str) -> set[str]:
    """Run `code` in a new interpreter; the top-level names it has imported."""
    report = "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code + report], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_down(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    assert violations(module, path.read_text(), is_package=is_package) == []


def test_every_floor_has_sources() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(FLOORS)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pallas_kernels.kv_cache", "import models"),
        ("pallas_kernels.kv_cache", "import numpy, serving.cli"),
        ("models.llama", "from jpaged.llm import LLM"),
        ("models.llama", "def f():\n    import jpaged"),
        ("models.llama", "if TYPE_CHECKING:\n    from serving import cli"),
        ("models.llama", "from models.config import Config"),
        ("models.llama", "from .. import jpaged"),
        ("models.llama", "from ..jpaged import llm"),
        ("models.llama", "importlib.import_module('jpaged.llm')"),
        ("models.gguf.read", "from ...jpaged import llm"),
        ("jpaged.runner", "import models as m"),
        ("jpaged.runner", "from models import load"),
        ("jpaged.runner", "__import__('models')"),
        ("jpaged.scheduler", "import jax.numpy as jnp"),
        ("jpaged.block_manager", "def f():\n    from flax import nnx"),
        ("jpaged.sequence", "from models import load"),
        ("jpaged.sampling_params", "from pallas_kernels import KVCache"),
    ],
)
def test_checker_finds(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pallas_kernels.kv_cache", "import jax\nfrom .paged_batch import PagedBatch"),
        ("models.llama", "from pallas_kernels import KVCache\nfrom . import config"),
        ("models.gguf.read", "from ..config import Config"),
        ("jpaged.llm", "import models\nfrom .engine import LLMEngine"),
        ("jpaged.runner", "import jax\nfrom pallas_kernels import KVCache\nimport models_of_others"),
        ("jpaged.scheduler", "import numpy as np\nfrom .sequence import Sequence"),
        ("serving.cli", "import jpaged\nfrom models.demo import pull"),
    ],
)
def test_checker_allows(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_checker_knows_a_package_from_its_modules() -> None:
    assert violations("jpaged", "from . import llm", is_package=True) == []
    assert len(violations("jpaged", "from .. import models", is_package=True)) == 1


@pytest.mark.parametrize("package", ["jpaged", "pallas_kernels"])
def test_import_loads_no_models(package: str) -> None:
    loaded = run_fresh(f"import {package}")
    assert package in loaded
    assert "models" not in loaded


@pytest.mark.parametrize("module", HOST_MODULES)
def test_host_logic_loads_no_jax(module: str) -> None:
    loaded = run_fresh(f"import {module}")
    assert "jpaged" in loaded
    assert not loaded & {"jax", "jaxlib", "flax", "models", "pallas_kernels"}
