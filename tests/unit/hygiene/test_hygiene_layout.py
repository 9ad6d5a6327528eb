"""Packages, import rules, docstrings and the fixed files of the repository."""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.repo import ROOT, name, python_files

APACHE_2_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_kernels_folder_is_no_package() -> None:
    """An import package `kernels` on the path breaks `import transformers`, which probes for Hugging Face's."""
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_two_import_packages_and_no_more() -> None:
    roots = [path.parent for folder in (ROOT, ROOT / "kernels") for path in folder.glob("*/__init__.py")]
    assert {name(path) for path in roots} == {"engine", "kernels/engine_kernels"}


def test_wheel_holds_both_packages_and_the_configuration() -> None:
    build = pyproject()["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"]["packages"] == ["engine", "kernels/engine_kernels"]
    assert build["targets"]["wheel"]["force-include"] == {"conf": "engine/conf"}
    assert build["dev-mode-dirs"] == [".", "kernels"]


def test_every_package_folder_has_an_init() -> None:
    """A folder without one is left out of mypy's and import-linter's view."""
    folders = {path.parent for path in python_files("engine", "kernels")}
    assert [name(f) for f in sorted(folders) if not (f / "__init__.py").exists()] == []


def test_every_engine_module_says_what_it_is() -> None:
    bare = [name(path) for path in python_files("engine", "kernels") if not ast.get_docstring(_tree(path))]
    assert bare == []


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter on the packages of `folder`, whatever is installed."""
    path = os.pathsep.join([str(folder), str(folder / "kernels")])
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    return subprocess.run(
        [*command, "--no-cache", "--no-logo"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_imports_point_one_way() -> None:
    done = _lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


PLANTS = [
    ("engine/topology/planted.py", "import engine.plan", "Imports point one way"),
    ("engine/planted.py", "", "Imports point one way"),
    ("engine/serve/planted.py", "import engine.runtime", "Serving and export need no DeepSpeed"),
    ("kernels/engine_kernels/planted.py", "import engine.errors", "Kernels stand alone"),
    ("engine/model/planted.py", "def late():\n    import deepspeed.comm", "DeepSpeed lives in engine.runtime"),
    ("engine/data/planted.py", "from omegaconf import OmegaConf", "Hydra lives in engine.config"),
    ("engine/plan/planted.py", "import torch.nn", "Config, layout and plan need no torch"),
]


def test_import_rules_catch_what_they_forbid(tmp_path: Path) -> None:
    for top in ("engine", "kernels"):
        shutil.copytree(ROOT / top, tmp_path / top, ignore=shutil.ignore_patterns("__pycache__", "conf"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for planted, text, _ in PLANTS:
        (tmp_path / planted).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / planted).write_text(f'"""Planted."""\n{text}\n')
        (tmp_path / planted).with_name("__init__.py").touch()
    done = _lint_imports(tmp_path)
    verdicts = [line for line in done.stdout.splitlines() if line.endswith("BROKEN") or " BROKEN " in line]
    missed = [contract for _, _, contract in PLANTS if not any(line.startswith(contract) for line in verdicts)]
    assert done.returncode != 0
    assert missed == []
    for planted, text, _ in PLANTS:
        module = planted.removeprefix("kernels/").removesuffix(".py").replace("/", ".")
        assert module in done.stdout, f"{planted} ({text}) was not reported:\n{done.stdout}"


def test_licence_is_apache_2() -> None:
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2_SHA256
    assert pyproject()["project"]["license"] == "Apache-2.0"


def test_continuous_integration_runs_the_documented_command() -> None:
    script = ROOT / ".ci" / "run"
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert os.access(script, os.X_OK)
    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test"]


def test_changelog_has_a_place_for_the_next_change() -> None:
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("goal", ["train", "test"])
def test_readme_commands_are_targets(goal: str) -> None:
    assert f"\n{goal}: " in (ROOT / "Makefile").read_text()
