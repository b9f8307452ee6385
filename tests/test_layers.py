"""Imports point down, importing touches no device, and `kernels` stays a bare name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "kernels": set(),
    "results_db": set(),
    "backend": {"kernels"},
    "jobs": {"backend", "results_db"},
    "app": {"jobs", "backend", "results_db"},
}
# What the app may know of the backend: descriptions, never a model.
APP_MAY_USE = ("spec", "recipes", "registry", "formats", "methods", "metrics", "layer", "published")
APP_MAY_USE += (
    "model.identity",
    "estimate",
    "environment",
    "solver_times",
    "kernel_times",
    "demo",
    "prompts",
    "judges",
)
APP_MAY_USE += ("statistics", "layer_rules", "lesson", "cache.growth", "kv_statistics")


def imports(path: Path) -> set[str]:
    """Dotted names of every module a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_point_down(package):
    for path in (ROOT / package).rglob("*.py"):
        used = {name.split(".")[0] for name in imports(path)} & set(ALLOWED)
        assert used <= ALLOWED[package] | {package}, f"{path.relative_to(ROOT)} imports {used}"


def test_the_app_never_touches_a_model():
    for path in (ROOT / "app").rglob("*.py"):
        for name in imports(path):
            if name.startswith("backend."):
                inner = name.removeprefix("backend.")
                fine = (
                    any(inner == p or inner.startswith(p + ".") for p in APP_MAY_USE)
                    or inner == "model"
                )
                assert fine, f"{path.relative_to(ROOT)} imports {name}"


def test_kernels_package_holds_a_docstring_only():
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    assert [type(node).__name__ for node in tree.body] == ["Expr"]
    assert ast.get_docstring(tree)


EVERYTHING = """
import pkgutil, sys, torch
def refuse(*a, **k): raise SystemExit("a device was touched on import")
torch.cuda._lazy_init = refuse
if hasattr(torch._C, "_cuda_getDeviceCount"): torch._C._cuda_getDeviceCount = refuse
for package in ("kernels", "results_db", "backend", "jobs", "app"):
    for module in pkgutil.walk_packages([package], package + "."):
        if not module.name.endswith("__main__"):
            __import__(module.name)
heavy = {"lm_eval", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""


def test_importing_everything_touches_no_device_and_no_heavy_extra():
    done = subprocess.run(
        [sys.executable, "-c", EVERYTHING], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['quantarena', '--help']\n"
        "from app.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'gradio', 'transformers', 'pandas', 'duckdb'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout
