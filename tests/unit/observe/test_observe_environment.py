from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.observe import environment as module
from engine.observe.environment import environment, git_state


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_it_is_json_and_tells_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    found = json.loads(json.dumps(environment()))
    assert found["python"] == platform.python_version()
    assert set(found["packages"]) == {"torch", "deepspeed", "transformers", "accelerate", "hydra-core", "triton"}
    assert found["packages"]["torch"]
    assert found["world_size"] == 8
    assert found["cpu_count"] >= 1
    assert platform.node() not in [str(value) for value in found.values()]


def test_an_absent_package_or_launcher_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("no-such-distribution",))
    for name in module.WORLD_SIZE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    found = environment()
    assert found["packages"] == {"no-such-distribution": None}
    assert found["world_size"] is None


def test_equal_devices_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["NVIDIA H200", "NVIDIA H200", "NVIDIA L4"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    assert environment()["devices"] == {"NVIDIA H200": 2, "NVIDIA L4": 1}


def test_packages_are_not_imported() -> None:
    code = (
        "import sys; from engine.observe.environment import environment; environment(); "
        "sys.exit(any(name in sys.modules for name in ('deepspeed', 'transformers', 'accelerate', 'hydra')))"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", code], env=environ, check=False).returncode == 0


def test_commit_and_changes_of_a_checkout(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) == {"commit": None, "dirty": False}
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    (tmp_path / "untracked.txt").write_text("x")
    clean = git_state(tmp_path)
    assert clean is not None
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "a.py").write_text("2")
    assert git_state(tmp_path) == {"commit": clean["commit"], "dirty": True}


def test_a_folder_inside_another_checkout_has_no_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    inner = tmp_path / "venv" / "site-packages"
    inner.mkdir(parents=True)
    assert git_state(inner) is None


def test_no_git_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None
