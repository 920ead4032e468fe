"""House rules that import-linter and ruff cannot express, and the layers themselves."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "eadt"
PRIVATE_RAY_TRAIN = "ray.train.v2._internal"


def imported_names(path: Path) -> Iterator[str]:
    """Full names of all that a module imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_only_one_adapter_uses_private_names_of_ray_train() -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for name in imported_names(path)
        if name.startswith(PRIVATE_RAY_TRAIN)
    }
    assert users <= {"adapters/ray_train.py"}


@pytest.mark.parametrize(
    "module", ["eadt", "eadt.config", "eadt.cli", "eadt.control.factory", "eadt.display"]
)
def test_importing_the_light_modules_loads_no_heavy_library(module: str) -> None:
    heavy = {"torch", "ray", "deepspeed", "transformers", "datasets", "pynvml", "numpy"}
    code = f"import sys, {module}; print(sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"
